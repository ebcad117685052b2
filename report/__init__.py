"""report.html: a comparison of checkpoints, or a sweep, as one file to open in a browser and to
send on.

    page.write(folder, arrays, result)      # arrays of landscapes.npz, result of compare.compare
    sweep_page.write(folder, result, settings, command)         # result of sweeps.result

`page.py` and `sweep_page.py` put the pages together, from `page.html` and `sweep.html`; what they
share is in `document.py`, with `document.html` and `page.css`. `viewer.py` packs what the viewer in
`page.js` shows, `tables.py`, `charts.py` and `moves.py` write what needs no script.
The file loads nothing: no server, no network, no library. It runs in a browser from disk, in a
notebook's frame, and prints.
"""
