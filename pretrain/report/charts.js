// Charts that zoom and tell their values. Each figure has its data beside its picture, and keeps that without a script.
"use strict";
for (const figure of document.querySelectorAll("figure")) {
  const data = figure.querySelector("script[type='application/json']");
  if (data) chart(figure, JSON.parse(data.textContent));
}

function chart(figure, {unit, x: axis, zero, series, levels}) {
  const box = document.createElement("div"), tip = document.createElement("div");
  box.className = "chart";
  tip.className = "tip";
  tip.hidden = true;
  figure.querySelector("img").replaceWith(box);
  box.after(tip);
  for (const line of series) line.shown = line.smooth && line.y.length >= 60 ? smoothed(line.y) : line.y;
  const all = [Math.min(...series.map(s => s.x[0])), Math.max(...series.map(s => s.x[s.x.length - 1]))];
  let view = all, frame = null, from = null;

  function draw() {
    const width = box.clientWidth || 440, height = Math.max(230, Math.min(300, width / 2));
    const names = series.length > 1 ? Math.min(150, 12 + 6.2 * Math.max(...series.map(s => s.name.length))) : 12;
    const area = {left: 54, right: width - names, top: 14, bottom: height - 34};
    const [low, high] = span(series, view, zero, levels);
    frame = {
      x: v => area.left + (v - view[0]) / ((view[1] - view[0]) || 1) * (area.right - area.left),
      y: v => area.bottom - (v - low) / ((high - low) || 1) * (area.bottom - area.top),
      value: at => view[0] + (at - area.left) / (area.right - area.left) * (view[1] - view[0]),
      area, width, height,
    };
    const parts = [];
    for (const v of ticks(low, high, 5)) {
      const y = frame.y(v);
      parts.push(`<line class="grid" x1="${area.left}" x2="${area.right}" y1="${y}" y2="${y}"/>`,
        `<text x="${area.left - 6}" y="${y + 4}" text-anchor="end">${number(v)}</text>`);
    }
    for (const v of ticks(view[0], view[1], width / 110)) {
      parts.push(`<text x="${frame.x(v)}" y="${area.bottom + 16}" text-anchor="middle">${number(v)}</text>`);
    }
    parts.push(`<text class="unit" x="${area.left}" y="10">${escaped(unit)}</text>`,
      `<text class="unit" x="${area.right}" y="${height - 4}" text-anchor="end">${axis}</text>`,
      `<svg x="${area.left}" y="${area.top}" width="${area.right - area.left}" height="${area.bottom - area.top}"
        viewBox="${area.left} ${area.top} ${area.right - area.left} ${area.bottom - area.top}">`);
    for (const line of series) {
      if (line.shown !== line.y) parts.push(path(line, line.y, "raw"));
      parts.push(path(line, line.shown, line.dash ? "line dash" : "line"));
      if (line.dots) line.x.forEach((v, i) => line.y[i] !== null && parts.push(
        `<circle cx="${frame.x(v)}" cy="${frame.y(line.y[i])}" r="3" fill="${line.colour}"/>`));
    }
    for (const {y, name} of levels) parts.push(
      `<line class="level" x1="${area.left}" x2="${area.right}" y1="${frame.y(y)}" y2="${frame.y(y)}"/>`,
      `<text x="${area.right - 4}" y="${frame.y(y) - 4}" text-anchor="end">${escaped(name)}</text>`);
    parts.push("</svg>", ...labels());
    box.innerHTML = `<svg width="${width}" height="${height}" role="img">${parts.join("")}<g class="mark"></g></svg>`;
  }

  function path(line, values, kind) {
    let d = "", pen = "M";
    line.x.forEach((v, i) => {
      if (values[i] === null) { pen = "M"; return; }
      d += `${pen}${frame.x(v).toFixed(1)} ${frame.y(values[i]).toFixed(1)}`;
      pen = "L";
    });
    return `<path class="${kind}" d="${d}" stroke="${line.colour}"/>`;
  }

  function labels() {
    if (series.length < 2) return [];
    const last = line => line.shown[index(line, view[1])] ?? line.shown.findLast(v => v !== null) ?? 0;
    const places = series.map(line => ({line, y: Math.min(Math.max(frame.y(last(line)), frame.area.top), frame.area.bottom)}));
    places.sort((a, b) => a.y - b.y);
    places.forEach((p, i) => { if (i) p.y = Math.max(p.y, places[i - 1].y + 13); });
    const over = Math.max(0, places[places.length - 1].y - frame.height + 6);
    return places.map(p => `<text class="name" x="${frame.area.right + 6}" y="${p.y - over + 4}" fill="${p.line.colour}">` +
      `${escaped(p.line.name.length > 22 ? p.line.name.slice(0, 21) + "…" : p.line.name)}</text>`);
  }

  function tell(at) {
    const mark = box.querySelector(".mark"), v = frame.value(at);
    const rows = [];
    let step = null, drawn = "";
    for (const line of series) {
      const i = index(line, v);
      if (line.y[i] === null || line.y[i] === undefined) continue;
      if (step === null || Math.abs(line.x[i] - v) < Math.abs(step - v)) step = line.x[i];
      rows.push([line, i]);
    }
    if (step === null) return;
    const near = rows.filter(([line, i]) => Math.abs(frame.x(line.x[i]) - frame.x(step)) < 24);
    for (const [line, i] of near) drawn += `<circle cx="${frame.x(line.x[i])}" cy="${frame.y(line.shown[i])}" r="4"
      fill="${line.colour}"/>`;
    const x = frame.x(step), a = frame.area;
    const pulled = from === null ? "" : `<rect x="${Math.min(from, at)}" y="${a.top}" width="${Math.abs(at - from)}"
      height="${a.bottom - a.top}"/>`;
    mark.innerHTML = `${pulled}<line x1="${x}" x2="${x}" y1="${a.top}" y2="${a.bottom}"/>${drawn}`;
    tip.innerHTML = `<b>${axis} ${number(step, true)}</b>` + near.map(([line, i]) =>
      `<span><i style="background:${line.colour}"></i>${escaped(line.name)} ${number(line.y[i])}</span>`).join("");
    tip.hidden = false;
    tip.style.left = `${Math.min(x + 14, frame.width - tip.offsetWidth)}px`;
  }

  const within = event => Math.min(Math.max(event.clientX - box.getBoundingClientRect().left, frame.area.left),
    frame.area.right);
  box.addEventListener("pointermove", event => tell(within(event)));
  box.addEventListener("pointerleave", () => { tip.hidden = true; from = null; box.querySelector(".mark").innerHTML = ""; });
  box.addEventListener("pointerdown", event => { from = within(event); });
  box.addEventListener("pointerup", event => {
    const to = within(event), began = from;
    from = null;
    if (began === null || Math.abs(to - began) < 8) return;
    view = [frame.value(Math.min(began, to)), frame.value(Math.max(began, to))];
    draw();
  });
  box.addEventListener("dblclick", () => { view = all; draw(); });
  addEventListener("resize", draw);
  draw();
}

function index(line, v) {  // of the point nearest to v
  let low = 0, high = line.x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (line.x[middle] < v) low = middle + 1; else high = middle;
  }
  return low && v - line.x[low - 1] < line.x[low] - v ? low - 1 : low;
}

function span(series, view, zero, levels) {  // of the values in view; a few that are far off do not count
  const values = series.flatMap(line => line.shown.filter((v, i) => v !== null && line.x[i] >= view[0] && line.x[i] <= view[1]));
  if (!values.length) return [0, 1];
  values.sort((a, b) => a - b);
  const at = share => values[Math.round(share * (values.length - 1))];
  let low = values[0], high = values[values.length - 1];
  const inner = at(.97) - at(.03);
  if (values.length >= 20 && inner > 0) {
    if (high - at(.97) > 2 * inner) high = at(.97) + inner / 4;
    if (at(.03) - low > 2 * inner) low = at(.03) - inner / 4;
  }
  for (const {y} of levels) {  // if that leaves the curve half of the height
    if (Math.max(y, high) - Math.min(y, low) < 2 * (high - low)) [low, high] = [Math.min(y, low), Math.max(y, high)];
  }
  const pad = (high - low || Math.abs(high) || 1) * .05;
  return [zero ? 0 : low - pad, high + pad];
}

function smoothed(values) {  // a running mean
  const half = Math.max(2, Math.floor(values.length / 100));
  return values.map((v, i) => {
    if (v === null) return null;
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter(w => w !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(2, count), power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough) ?? power;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step / 2 ? 0 : v);
  return found;
}

function number(v, whole) {
  if (whole) return Math.round(v).toLocaleString("en");
  const size = Math.abs(v);
  if (size >= 1e9) return +(v / 1e9).toPrecision(4) + "B";
  if (size >= 1e6) return +(v / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(v / 1e3).toPrecision(4) + "k";
  return size && size < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
}

function escaped(text) {
  return text.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);
}
