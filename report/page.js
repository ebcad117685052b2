"use strict";
// The viewer: what is chosen is in `state`; `draw` shows it. Nothing is loaded.
(() => {
  const data = JSON.parse(document.getElementById("content").textContent);
  const el = (id) => document.getElementById(id);
  const TRUTH = "#d55e00", PLAN = "#56b4e9";
  const C = data.checkpoints.length, P = data.pairs.length;
  const state = {pair: 0, plane: 0, checkpoint: data.first, kind: "l1", own: false,
                 turn: -60, tilt: 35, level: null, cell: null, printing: false};

  // Numbers

  function bytes(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  function floats(text) {
    const view = new DataView(bytes(text).buffer);
    return Float32Array.from({length: view.byteLength / 4}, (_, i) => view.getFloat32(4 * i, true));
  }

  for (const plane of data.planes) {
    for (const kind of ["l1", "l2"]) {
      if (plane[kind]) plane[kind].energy = floats(plane[kind].energy);
    }
  }
  for (const kind of Object.keys(data.true)) data.true[kind] = floats(data.true[kind]);
  const colours = bytes(data.map);

  // The shortest decimal that is this float32 and no other.
  function exact(x) {
    for (let digits = 1; digits <= 9; digits++) {
      const text = x.toPrecision(digits);
      if (Math.fround(Number(text)) === x) return text;
    }
    return String(x);
  }

  function signed(cm) {
    const text = Math.abs(cm).toFixed(2);
    return (Number(text) === 0 ? "" : cm < 0 ? "−" : "+") + text;
  }

  // Of an axis, with as many digits as it needs.
  function label(t) {
    return (t < -1e-9 ? "−" : "") + Number(Math.abs(t) < 1e-9 ? 0 : Math.abs(t).toPrecision(3));
  }

  function percent(x) {
    return `${x >= 99.95 ? x.toFixed(0) : x >= 9.995 ? x.toFixed(1) : x.toPrecision(2)} %`;
  }

  // One landscape: ticks in cm, energies and what is above the minimum, in % of the mean.
  function landscape(k, kind, c, p) {
    const plane = data.planes[k], all = plane[kind].energy, K = all.length / (C * P);
    const energy = all.subarray((c * P + p) * K, (c * P + p + 1) * K);
    const metres = plane.ticks[plane.ticks.length > 1 ? p : 0];
    const ticks = metres.map((axis) => axis.map((t) => 100 * t));
    let lowest = 0, size = 0;
    energy.forEach((e, i) => {
      size += Math.abs(e) / K;
      if (e < energy[lowest]) lowest = i;
    });
    const above = Float64Array.from(energy, (e) => 100 * (e - energy[lowest]) / (size || 1));
    return {plane, ticks, energy, above, lowest, K, flat: plane[kind].flat[c][p] === 1,
            range: Math.max(...above), scale: plane[kind].scale};
  }

  // Place of energy number i on each axis.
  function places(ticks, i) {
    const out = [];
    for (let a = ticks.length - 1; a >= 0; a--) {
      out.unshift(i % ticks[a].length);
      i = Math.floor(i / ticks[a].length);
    }
    return out;
  }

  function number(ticks, place) {
    return place.reduce((i, n, a) => i * ticks[a].length + n, 0);
  }

  // What is drawn is a plane: of a grid over three axes one level of the third.
  function shown(land) {
    const [x, y, z] = land.ticks, own = places(land.ticks, land.lowest)[2];
    // That of the minimum, until another one is chosen.
    const level = z ? Math.min(state.level ?? own, z.length - 1) : 0;
    const index = (i, j) => number(land.ticks, z ? [i, j, level] : [i, j]);
    return {x, y, level, index};
  }

  function edges(ticks) {
    const n = ticks.length;
    const middles = ticks.slice(1).map((t, i) => (t + ticks[i]) / 2);
    return [2 * ticks[0] - middles[0], ...middles, 2 * ticks[n - 1] - middles[n - 2]];
  }

  function position(plane, move) {
    return plane.axes.map((axis) => 100 * move["xyz".indexOf(axis)]);
  }

  // {name, at (cm), energy, kind} of the true action, the minimum and the plans.
  function marks(land, c, p) {
    const {plane} = land, place = places(land.ticks, land.lowest);
    const found = [
      {kind: "truth", name: "true action", at: position(plane, data.truths[p]),
       energy: data.true[state.kind][c * P + p]},
      {kind: "minimum", name: "minimum of the grid", at: place.map((n, a) => land.ticks[a][n]),
       energy: land.energy[land.lowest]}];
    for (const plan of data.plans) {
      found.push({kind: "plan", name: `plan, ${plan.name}`, at: position(plane, plan.moves[c][p])});
    }
    return found;
  }

  // Drawing

  function colour(share) {
    const i = 3 * Math.max(0, Math.min(255, Math.round(255 * share)));
    return `rgb(${colours[i]},${colours[i + 1]},${colours[i + 2]})`;
  }

  function ink(name) {
    if (state.printing) return name === "--ink" ? "#111" : "#555";
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // A canvas of width x height CSS pixels, sharp on any screen.
  function context(canvas, width, height) {
    const ratio = Math.max(1, window.devicePixelRatio || 1);
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    // On paper it is narrower than it was drawn.
    canvas.style.aspectRatio = `${width} / ${height}`;
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    g.font = "12px system-ui, sans-serif";
    return g;
  }

  function drawMark(g, kind, x, y, r) {
    g.save();
    g.lineJoin = g.lineCap = "round";
    g.beginPath();
    if (kind === "truth") {
      g.moveTo(x - r, y); g.lineTo(x + r, y); g.moveTo(x, y - r); g.lineTo(x, y + r);
      g.lineWidth = 0.9 * r; g.strokeStyle = "#fff"; g.stroke();
      g.lineWidth = 0.5 * r; g.strokeStyle = TRUTH; g.stroke();
    } else if (kind === "minimum") {
      g.arc(x, y, 0.9 * r, 0, 2 * Math.PI);
      g.lineWidth = 0.55 * r; g.strokeStyle = "#111"; g.stroke();
      g.lineWidth = 0.3 * r; g.strokeStyle = "#fff"; g.stroke();
    } else {
      g.moveTo(x, y - r); g.lineTo(x + r, y + 0.8 * r); g.lineTo(x - r, y + 0.8 * r); g.closePath();
      g.lineWidth = 0.4 * r; g.strokeStyle = "#111"; g.stroke();
      g.fillStyle = PLAN; g.fill();
    }
    g.restore();
  }

  function cells(g, land, x0, y0, width, height, end) {
    const {x, y, index} = shown(land), ex = edges(x), ey = edges(y);
    const px = (v) => x0 + (v - ex[0]) / (ex[x.length] - ex[0]) * width;
    const py = (v) => y0 + height - (v - ey[0]) / (ey[y.length] - ey[0]) * height;
    for (let i = 0; i < x.length; i++) {
      for (let j = 0; j < y.length; j++) {
        const [left, right] = [Math.round(px(ex[i])), Math.round(px(ex[i + 1]))];
        const [top, bottom] = [Math.round(py(ey[j + 1])), Math.round(py(ey[j]))];
        g.fillStyle = colour(land.above[index(i, j)] / end);
        // A little into the next cell, which is drawn later: on paper there would be lines between.
        g.fillRect(left, top - (j + 1 < y.length), right - left + (i + 1 < x.length),
                   bottom - top + (j + 1 < y.length));
      }
    }
    return {px, py, ex, ey, x, y, index};
  }

  // An action outside the grid is an arrow at its edge.
  function drawMarks(g, found, place, r, labels) {
    const {px, py, ex, ey, x, y} = place;
    // The truth last: nothing is to cover it.
    for (const mark of found.slice().reverse()) {
      const [mx, my] = mark.at;
      const reach = Math.max(Math.abs(mx) / Math.max(-ex[0], ex[x.length]),
                             Math.abs(my) / Math.max(-ey[0], ey[y.length]));
      if (reach <= 1) {
        drawMark(g, mark.kind, px(mx), py(my), r);
        continue;
      }
      const [tx, ty] = [px(mx / reach), py(my / reach)];
      const [bx, by] = [px(0.72 * mx / reach), py(0.72 * my / reach)];
      const angle = Math.atan2(ty - by, tx - bx);
      g.save();
      g.lineCap = "round";
      for (const [style, width] of [["#fff", 4.5], [mark.kind === "truth" ? TRUTH : PLAN, 2.2]]) {
        g.strokeStyle = style; g.lineWidth = width * r / 7;
        g.beginPath(); g.moveTo(bx, by); g.lineTo(tx, ty);
        for (const side of [-0.5, 0.5]) {
          g.moveTo(tx, ty);
          g.lineTo(tx - r * Math.cos(angle + side), ty - r * Math.sin(angle + side));
        }
        g.stroke();
      }
      if (labels) {
        const text = `${Math.hypot(mx, my).toFixed(0)} cm`, w = g.measureText(text).width + 6;
        const [cx, cy] = [px(0.55 * mx / reach), py(0.55 * my / reach)];
        g.fillStyle = "rgba(255,255,255,.88)"; g.fillRect(cx - w / 2, cy - 9, w, 17);
        g.fillStyle = "#8a3c00"; g.textAlign = "center"; g.fillText(text, cx, cy + 4);
      }
      g.restore();
    }
  }

  let placed = null;      // of the map that is drawn, for the pointer

  function drawMap(land, found, end) {
    const canvas = el("map"), width = canvas.clientWidth;
    const [left, bottom, top, right] = [48, 38, 8, 8], size = width - left - right;
    const g = context(canvas, width, size + top + bottom);
    placed = cells(g, land, left, top, size, size, end);
    g.fillStyle = g.strokeStyle = ink("--ink");
    g.textAlign = "center";
    const {px, py, x, y} = placed, [a, b] = land.plane.axes;
    for (const t of round(x)) {
      g.fillRect(px(t) - 0.5, top + size, 1, 4);
      g.fillText(label(t), px(t), top + size + 16);
    }
    g.fillText(`Δ${a} (cm)`, left + size / 2, top + size + 33);
    g.textAlign = "right";
    for (const t of round(y)) {
      g.fillRect(left - 4, py(t) - 0.5, 4, 1);
      g.fillText(label(t), left - 7, py(t) + 4);
    }
    g.save();
    g.translate(11, top + size / 2); g.rotate(-Math.PI / 2);
    g.textAlign = "center"; g.fillText(`Δ${b} (cm)`, 0, 0);
    g.restore();
    g.save();
    g.beginPath(); g.rect(left, top, size, size); g.clip();
    drawMarks(g, found, placed, 7, true);
    g.restore();
    if (state.cell) {
      const [i, j] = state.cell, {ex, ey} = placed;
      g.lineWidth = 3; g.strokeStyle = "#fff";
      const box = [px(ex[i]), py(ey[j + 1]), px(ex[i + 1]) - px(ex[i]), py(ey[j]) - py(ey[j + 1])];
      g.strokeRect(...box);
      g.lineWidth = 1.4; g.strokeStyle = "#000"; g.strokeRect(...box);
    }
  }

  // Round numbers within the ticks, about five of them.
  function round(ticks) {
    const [low, high] = [ticks[0], ticks[ticks.length - 1]];
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= 0.999 * rough);
    const first = Math.ceil(low / step - 1e-6), last = Math.floor(high / step + 1e-6);
    return Array.from({length: last - first + 1}, (_, n) => (first + n) * step);
  }

  function drawSurface(land, found, end) {
    const canvas = el("surface"), width = canvas.clientWidth, height = width * 0.92;
    const {x, y, index} = shown(land);
    const g = context(canvas, width, height);
    const top = Math.max(end, land.range), scaled = (t, ticks) =>
      2 * (t - ticks[0]) / (ticks[ticks.length - 1] - ticks[0]) - 1;
    const a = state.turn * Math.PI / 180, e = state.tilt * Math.PI / 180;
    const s = 0.295 * width, middle = height * 0.53;
    // u to the right, v up, w away from the viewer
    const project = (px, py, pz) => {
      const u = px * Math.cos(a) - py * Math.sin(a), away = px * Math.sin(a) + py * Math.cos(a);
      const v = (1.15 * pz - 0.5) * Math.cos(e) + away * Math.sin(e);
      return [width / 2 + s * u, middle - s * v, away * Math.cos(e) - pz * Math.sin(e)];
    };
    const corner = x.map((tx, i) => y.map((ty, j) =>
      project(scaled(tx, x), scaled(ty, y), land.above[index(i, j)] / top)));
    // The frame below
    const near = (one, two) => (project(...one)[2] < project(...two)[2] ? one : two);
    g.strokeStyle = ink("--line"); g.fillStyle = ink("--ink"); g.lineWidth = 1;
    const floor = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([u, v]) => project(u, v, 0));
    g.beginPath(); floor.forEach(([u, v], i) => (i ? g.lineTo(u, v) : g.moveTo(u, v)));
    g.closePath(); g.stroke();
    const quads = [];
    for (let i = 0; i + 1 < x.length; i++) {
      for (let j = 0; j + 1 < y.length; j++) {
        const four = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
        const corners = four.map(([m, n]) => corner[m][n]);
        const mean = four.reduce((sum, [m, n]) => sum + land.above[index(m, n)] / 4, 0);
        quads.push({corners, mean, depth: corners.reduce((sum, q) => sum + q[2], 0)});
      }
    }
    quads.sort((one, two) => two.depth - one.depth);
    g.lineJoin = "round"; g.lineWidth = 0.6;
    for (const {corners, mean} of quads) {
      g.fillStyle = colour(mean / end); g.strokeStyle = "rgba(0,0,0,.35)";
      g.beginPath(); corners.forEach(([u, v], n) => (n ? g.lineTo(u, v) : g.moveTo(u, v)));
      g.closePath(); g.fill(); g.stroke();
    }
    // Axes: names at the near edges, values at their ends
    g.fillStyle = ink("--ink"); g.textAlign = "center";
    const [nameX, nameY] = land.plane.axes;
    const sideY = near([0, -1, 0], [0, 1, 0])[1], sideX = near([-1, 0, 0], [1, 0, 0])[0];
    const write = (text, u, v) => {
      const [tx, ty] = project(u, v, 0);
      g.fillText(text, tx, ty + 5);
    };
    write(`Δ${nameX} (cm)`, 0, 1.36 * sideY);
    write(`Δ${nameY} (cm)`, 1.36 * sideX, 0);
    write(label(x[0]), -0.92, 1.16 * sideY);
    write(label(x[x.length - 1]), 0.92, 1.16 * sideY);
    write(label(y[0]), 1.16 * sideX, -0.92);
    write(label(y[y.length - 1]), 1.16 * sideX, 0.92);
    // The height, at the corner that is farthest to the left
    const foot = [[-1, -1], [1, -1], [1, 1], [-1, 1]].reduce((one, two) =>
      (project(...two, 0)[0] < project(...one, 0)[0] ? two : one));
    if (state.tilt < 80) {
      const [u0, v0] = project(...foot, 0), [u1, v1] = project(...foot, 1);
      g.strokeStyle = ink("--muted"); g.lineWidth = 1;
      g.beginPath(); g.moveTo(u0, v0); g.lineTo(u1, v1); g.stroke();
      g.textAlign = "left"; g.fillText(percent(top), Math.max(2, u1 - 20), v1 - 6);
    }
    for (const mark of found.slice().reverse()) {
      const [tx, ty] = [scaled(mark.at[0], x), scaled(mark.at[1], y)];
      if (Math.max(Math.abs(tx), Math.abs(ty)) > 1.0001) continue;
      const nearest = [x, y].map((ticks, n) => ticks.reduce((best, t, i) =>
        (Math.abs(t - mark.at[n]) < Math.abs(ticks[best] - mark.at[n]) ? i : best), 0));
      const h = land.above[index(...nearest)] / top, [u, v] = project(tx, ty, h);
      if (mark.kind === "truth") {
        const [u1, v1] = project(tx, ty, Math.min(1.1, h + 0.45));
        for (const [style, w] of [["#fff", 4], [TRUTH, 2]]) {
          g.strokeStyle = style; g.lineWidth = w;
          g.beginPath(); g.moveTo(u, v); g.lineTo(u1, v1); g.stroke();
        }
        drawMark(g, "truth", u1, v1, 6);
      } else {
        drawMark(g, mark.kind, u, v, 6);
      }
    }
  }

  // Words

  function row(cells, head) {
    const line = document.createElement("tr");
    for (const [n, text] of cells.entries()) {
      const cell = document.createElement(n || !head ? "td" : "th");
      cell.append(text);
      line.append(cell);
    }
    return line;
  }

  function where(plane, at) {
    return plane.axes.map((axis, a) => `Δ${axis} ${signed(at[a])}`).join(", ") + " cm";
  }

  const SIGNS = {truth: "✚", minimum: "○", plan: "▲"};

  function writeMarks(land, found) {
    const lines = found.map((mark) => {
      const sign = document.createElement("span"), name = document.createElement("span");
      sign.className = `key ${mark.kind}`;
      sign.textContent = SIGNS[mark.kind];
      name.append(sign, ` ${mark.name}`);
      const away = Math.hypot(...mark.at.map((v, a) => v - found[0].at[a]));
      return row([name, where(land.plane, mark.at),
                  mark.energy === undefined ? "" : `energy ${exact(mark.energy)}`,
                  mark.kind === "truth" ? "" : `${away.toFixed(2)} cm from the truth`], true);
    });
    el("marks").tBodies[0].replaceChildren(...lines,
      row(["range of the energies", percent(land.range) + " of their mean", "", ""], true));
  }

  function writeReadout(land) {
    const readout = el("readout");
    if (!state.cell) {
      readout.textContent = "Point at the map, touch it, or focus it and use the arrow keys, to " +
        "read energies.";
      return;
    }
    const {x, y, index, level} = shown(land), [i, j] = state.cell, n = index(i, j);
    const at = [x[i], y[j], ...(land.ticks[2] || []).slice(level, level + 1)];
    const bold = document.createElement("b");
    bold.id = "energy";
    bold.textContent = exact(land.energy[n]);
    readout.replaceChildren(where(land.plane, at), document.createElement("br"), "energy ", bold,
                            `, ${percent(land.above[n])} of the mean above the minimum`);
  }

  // All of it

  const current = () => landscape(state.plane, state.kind, state.checkpoint, state.pair);
  const scaleOf = (land) => (state.own ? land.range || 1 : land.scale);

  function draw() {
    const land = current(), found = marks(land, state.checkpoint, state.pair), end = scaleOf(land);
    const pair = data.pairs[state.pair];
    if (state.cell) {
      const {x, y} = shown(land);
      state.cell = [Math.min(state.cell[0], x.length - 1), Math.min(state.cell[1], y.length - 1)];
    }
    const frames = pair.frames ? `, recorded frames ${pair.frames[0]} → ${pair.frames[1]}` : "";
    el("episode").textContent = `Pair ${state.pair}: ${pair.episode}${frames}`;
    for (const [n, id] of ["context", "goal"].entries()) {
      el(id).parentElement.hidden = !pair.images;
      if (pair.images) el(id).src = `data:image/jpeg;base64,${pair.images[n]}`;
      el(id).alt = `${id} image of pair ${state.pair}`;
    }
    el("no-images").hidden = !!pair.images;
    const levels = land.ticks[2];
    el("slice").hidden = !levels;
    if (levels) {
      const {level} = shown(land);
      el("level").max = levels.length - 1;
      el("level").value = level;
      el("slice").querySelector("label").textContent = `Δ${land.plane.axes[2]}`;
      el("level-value").textContent = `${signed(levels[level])} cm`;
    }
    el("flat").hidden = !land.flat;
    el("map").setAttribute("aria-label", `landscape ${land.plane.title} of pair ${state.pair} ` +
      `under ${data.checkpoints[state.checkpoint]}${land.flat ? ", flat" : ""}`);
    const bar = el("bar").querySelector("canvas"), g = bar.getContext("2d");
    for (let n = 0; n < bar.width; n++) {
      g.fillStyle = colour(n / (bar.width - 1));
      g.fillRect(n, 0, 1, 1);
    }
    el("bar-end").textContent = `${percent(end)} of the mean` +
      (!state.own && land.range > end ? " and more" : "");
    drawMap(land, found, end);
    drawSurface(land, found, end);
    writeMarks(land, found);
    writeReadout(land);
    el("pair").value = state.pair;
    el("checkpoint").value = state.checkpoint;
    el("previous").disabled = state.pair === 0;
    el("next").disabled = state.pair === P - 1;
    for (const button of document.querySelectorAll("#overview button")) {
      button.setAttribute("aria-pressed", Number(button.dataset.pair) === state.pair &&
                          Number(button.dataset.checkpoint) === state.checkpoint);
    }
  }

  function drawOverview() {
    for (const button of document.querySelectorAll("#overview button")) {
      const [p, c] = [Number(button.dataset.pair), Number(button.dataset.checkpoint)];
      const land = landscape(state.plane, state.kind, c, p);
      const size = 68, g = context(button.firstChild, size, size);
      const place = cells(g, land, 0, 0, size, size, scaleOf(land));
      drawMarks(g, marks(land, c, p), place, 4.5, false);
      button.classList.toggle("flat", land.flat);
      button.setAttribute("aria-label",
                          `pair ${p}, ${data.checkpoints[c]}${land.flat ? ", flat" : ""}`);
    }
  }

  function makeOverview() {
    const grid = el("overview"), images = data.pairs.some((pair) => pair.images);
    grid.style.gridTemplateColumns = `repeat(${images ? 3 : 1}, max-content) repeat(${C}, 72px)`;
    const head = (text) => {
      const cell = document.createElement("span");
      cell.className = "name";
      cell.title = text;
      cell.textContent = text.length > 26 ? `…${text.slice(-25)}` : text;
      return cell;
    };
    grid.append(head("pair"), ...(images ? [head("context"), head("goal")] : []),
                ...data.checkpoints.map(head));
    data.pairs.forEach((pair, p) => {
      const label = document.createElement("span");
      label.className = "number";
      label.textContent = p;
      label.title = pair.episode;
      grid.append(label);
      for (const [n, name] of images ? ["context", "goal"].entries() : []) {
        const image = document.createElement("img");
        image.alt = `${name} of pair ${p}`;
        if (pair.images) image.src = `data:image/jpeg;base64,${pair.images[n]}`;
        grid.append(image);
      }
      for (let c = 0; c < C; c++) {
        const button = document.createElement("button");
        button.type = "button";
        // The fields above do the same: 200 stops of the tab key would help nobody.
        button.tabIndex = -1;
        [button.dataset.pair, button.dataset.checkpoint] = [p, c];
        button.append(document.createElement("canvas"));
        button.addEventListener("click", () => {
          [state.pair, state.checkpoint] = [p, c];
          draw();
        });
        grid.append(button);
      }
    });
  }

  // Controls

  function options(id, texts) {
    el(id).replaceChildren(...texts.map((text, n) => new Option(text, n)));
  }

  function choices(id, texts, change) {
    texts.forEach((text, n) => {
      const label = document.createElement("label"), input = document.createElement("input");
      const span = document.createElement("span");
      label.className = "choice";
      Object.assign(input, {type: "radio", name: id, value: n, checked: n === 0});
      span.textContent = text;
      input.addEventListener("change", () => {
        change(n);
        draw();
        drawOverview();
      });
      label.append(input, span);
      el(id).append(label);
    });
  }

  const kinds = ["l1", "l2"].filter((kind) => data.true[kind]);
  options("pair", data.pairs.map((pair, p) => {
    const name = pair.episode.replace(/\/trajectory\.h5$/, "");
    return `${p}: ${name.length > 24 ? `…${name.slice(-23)}` : name}`;
  }));
  options("checkpoint", data.checkpoints);
  choices("planes", data.planes.map((plane) => plane.title), (n) => { state.plane = n; });
  choices("kinds", kinds.map((kind) => kind.toUpperCase()), (n) => { state.kind = kinds[n]; });
  choices("scales", ["one scale for all", "own scale"], (n) => { state.own = n === 1; });
  el("plan-key").hidden = !data.plans.length;

  const choose = (name, value) => {
    state[name] = value;
    draw();
  };
  el("pair").addEventListener("change", () => choose("pair", Number(el("pair").value)));
  el("checkpoint").addEventListener("change",
    () => choose("checkpoint", Number(el("checkpoint").value)));
  el("previous").addEventListener("click", () => choose("pair", Math.max(0, state.pair - 1)));
  el("next").addEventListener("click", () => choose("pair", Math.min(P - 1, state.pair + 1)));
  el("level").addEventListener("input", () => {
    choose("level", Number(el("level").value));
    drawOverview();
  });
  for (const id of ["turn", "tilt"]) {
    el(id).addEventListener("input", () => choose(id, Number(el(id).value)));
  }

  // The pointer, a finger or the arrow keys on the map

  function cellAt(event) {
    const box = el("map").getBoundingClientRect(), {px, py, ex, ey, x, y} = placed;
    const [u, v] = [event.clientX - box.left, event.clientY - box.top];
    const i = x.findIndex((_, n) => u >= px(ex[n]) && u < px(ex[n + 1]));
    const j = y.findIndex((_, n) => v <= py(ey[n]) && v > py(ey[n + 1]));
    return i < 0 || j < 0 ? null : [i, j];
  }

  function point(event) {
    const cell = cellAt(event);
    if (String(cell) !== String(state.cell)) choose("cell", cell);
  }
  el("map").addEventListener("pointermove", point);
  el("map").addEventListener("pointerdown", point);
  el("map").addEventListener("pointerleave", (event) => {
    // A finger that is lifted leaves, too; what it touched is still to be read.
    if (event.pointerType === "mouse") choose("cell", null);
  });
  const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1]};
  el("map").addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const land = current(), {x, y} = shown(land), sizes = [x.length, y.length];
    const from = state.cell || places(land.ticks, land.lowest).slice(0, 2);
    choose("cell", state.cell ? from.map((n, a) =>
      Math.max(0, Math.min(sizes[a] - 1, n + step[a]))) : from);
  });

  // Turning the surface

  const TILTS = [5, 90];
  let drag = null;
  function turn(dx, dy) {
    state.turn = ((state.turn + dx + 540) % 360) - 180;
    state.tilt = Math.max(TILTS[0], Math.min(TILTS[1], state.tilt + dy));
    [el("turn").value, el("tilt").value] = [state.turn, state.tilt];
    drawSurface(current(), marks(current(), state.checkpoint, state.pair), scaleOf(current()));
  }
  el("surface").addEventListener("pointerdown", (event) => {
    // A second finger enlarges the page.
    drag = event.isPrimary ? [event.clientX, event.clientY] : null;
    if (drag) el("surface").setPointerCapture(event.pointerId);
  });
  el("surface").addEventListener("pointermove", (event) => {
    if (!drag) return;
    turn(0.5 * (drag[0] - event.clientX), 0.4 * (event.clientY - drag[1]));
    drag = [event.clientX, event.clientY];
  });
  for (const name of ["pointerup", "pointercancel"]) {
    el("surface").addEventListener(name, () => { drag = null; });
  }
  // A finger that moves up or down tilts, and where the tilt has come to its end scrolls the page:
  // the surface fills the screen of a phone, and must not hold on to it.
  let touched = null;
  el("surface").addEventListener("touchstart", ({touches}) => {
    touched = [touches[0].clientX, touches[0].clientY];
  }, {passive: true});
  el("surface").addEventListener("touchmove", (event) => {
    const [x, y] = [event.touches[0].clientX - touched[0], event.touches[0].clientY - touched[1]];
    const scrolls = Math.abs(y) > Math.abs(x) && state.tilt === TILTS[y > 0 ? 1 : 0];
    if (event.touches.length === 1 && event.cancelable && !scrolls) event.preventDefault();
  }, {passive: false});
  el("surface").addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    turn(6 * step[0], 4 * step[1]);
  });

  // Sizes, themes and paper

  const all = () => { draw(); drawOverview(); };
  let width = 0;
  new ResizeObserver(() => {
    if (el("map").clientWidth !== width) {
      width = el("map").clientWidth;
      draw();
    }
  }).observe(el("map"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => { state.printing = printing; all(); });
  }

  makeOverview();
  all();
})();
