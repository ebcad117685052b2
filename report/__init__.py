"""report.html: a comparison of checkpoints as one file to open in a browser and to send on.

    page.write(folder, arrays, result)      # arrays of landscapes.npz, result of compare.compare

`page.py` puts the page together: `page.html` is its skeleton, `page.css` and `page.js` go into it,
`viewer.py` packs what the viewer shows, `tables.py` and `charts.py` write what needs no script.
The file loads nothing: no server, no network, no library. It runs in a browser from disk, in a
notebook's frame, and prints.
"""
