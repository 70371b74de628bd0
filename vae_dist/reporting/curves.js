"use strict";
// Curves as SVG: one panel of lines over the steps, with a hover line and a legend that follows it.

function smooth(points) {
  if (!smoothing || points.length < 3) return points;
  const weight = smoothing / 100;
  let level = points[0][1];
  return points.map(([x, y]) => [x, (level = weight * level + (1 - weight) * y)]);
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-6 ? 0 : t);
  return found;
}

function logTicks(low, high) {
  if (high - low < 1) return ticks(10 ** low, 10 ** high, 3).filter((t) => t > 0).map(Math.log10).filter((t) => t >= low);
  const found = [];
  for (let p = Math.floor(low); p <= Math.ceil(high); p++)
    for (const m of high - low > 2.5 ? [1] : [1, 2, 5]) {
      const t = Math.log10(m) + p;
      if (t >= low - 1e-9 && t <= high + 1e-9) found.push(t);
    }
  return found;
}

function seriesOf(panel) {
  const found = [];
  runs.forEach((run, i) =>
    panel.keys.forEach((key, k) => {
      const points = (run.curves[key] || []).filter((p) => !panel.log || p[1] > 0);
      if (!points.length) return;
      const isEvaluation = key.startsWith("eval/");
      const name = [several && run.name, panel.keys.length > 1 && (isEvaluation ? "validation" : "training")].filter(Boolean).join(" ");
      const paint = several ? color(i) : isEvaluation ? COLORS[1] : COLORS[0];
      found.push({ name: name || panel.title, paint, points, isEvaluation, faint: several && k === 0 && panel.keys.length > 1 });
    }),
  );
  return found;
}

// The range without the first outliers: a loss starts far above where it becomes interesting.
function range(series, isLog) {
  const y = series.flatMap((s) => s.points.map((p) => (isLog ? Math.log10(p[1]) : p[1]))).sort((a, b) => a - b);
  let low = y[0];
  let high = y.at(-1);
  const upper = y[Math.min(y.length - 1, Math.floor(y.length * 0.97))];
  if (!isLog && y.length > 20 && high - low > 3 * (upper - low)) high = upper + 0.15 * (upper - low);
  if (low === high) {
    const room = isLog ? 0.5 : Math.abs(low) * 0.1 || 1;
    return [low - room, high + room];
  }
  const room = 0.06 * (high - low);
  return [!isLog && low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function curvePanel(panel) {
  const W = 300, H = 180, L = 42, R = 8, T = 8, B = 22;
  const series = seriesOf(panel);
  const xMax = Math.max(1, ...series.map((s) => s.points.at(-1)[0]));
  const [low, high] = range(series, panel.log);
  const x = (step) => L + (step / xMax) * (W - L - R);
  const y = (value) => T + (1 - ((panel.log ? Math.log10(value) : value) - low) / (high - low)) * (H - T - B);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": panel.title });
  for (const t of panel.log ? logTicks(low, high) : ticks(low, high, 4)) {
    const at = T + (1 - (t - low) / (high - low)) * (H - T - B);
    svg.append(draw("line", { class: "gridline", x1: L, x2: W - R, y1: at, y2: at }));
    svg.append(draw("text", { x: L - 6, y: at + 4, "text-anchor": "end" }, number(panel.log ? 10 ** t : t)));
  }
  for (const t of ticks(0, xMax, 4))
    svg.append(draw("text", { x: x(t), y: H - 6, "text-anchor": "middle" }, t >= 1000 ? t / 1000 + "k" : String(t)));
  svg.append(draw("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }));
  const id = "clip" + Math.random().toString(36).slice(2);
  svg.append(draw("clipPath", { id }, draw("rect", { x: L, y: T - 3, width: W - L - R + 3, height: H - T - B + 3 })));
  const lines = draw("g", { "clip-path": `url(#${id})` });
  const cross = draw("line", { class: "cross", y1: T, y2: H - B });
  svg.append(lines, cross);
  const legend = make("div", { class: "legend" });

  function redraw() {
    lines.replaceChildren();
    for (const s of series) {
      const points = s.isEvaluation ? s.points : smooth(s.points);
      const path = points.map(([a, b], i) => (i ? "L" : "M") + x(a).toFixed(1) + " " + y(b).toFixed(1)).join("");
      lines.append(draw("path", { d: path, fill: "none", stroke: s.paint, "stroke-width": s.isEvaluation ? 2.2 : 1.5, "stroke-opacity": s.faint ? 0.4 : 1, "stroke-linejoin": "round" }));
      if (points.length === 1 || (s.isEvaluation && points.length <= 40))
        for (const [a, b] of points) lines.append(draw("circle", { cx: x(a), cy: y(b), r: 2.6, fill: s.paint }));
    }
  }

  function tell(step) {
    legend.replaceChildren();
    const isHover = step !== null;
    cross.style.visibility = isHover ? "visible" : "hidden";
    if (isHover) {
      cross.setAttribute("x1", x(step));
      cross.setAttribute("x2", x(step));
    }
    const shown = series.length > 1 || isHover || several ? series : [];
    for (const s of shown.length ? shown : series) {
      const [at, value] = isHover ? nearest(s.points, step) : s.points.at(-1);
      const item = make("span", {}, make("i", { style: "background:" + s.paint + (s.faint ? ";opacity:.4" : "") }));
      item.append(series.length > 1 ? s.name + " " : "", make("b", {}, number(value)), isHover ? " at " + number(at) : "");
      legend.append(item);
    }
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = (((event.clientX - box.left) / box.width) * W - L) / (W - L - R) * xMax;
    tell(Math.max(0, Math.min(xMax, step)));
  });
  svg.addEventListener("pointerleave", () => tell(null));
  redraw();
  redraws.push(redraw);
  tell(null);
  const title = make("h3", {}, panel.title, make("span", { class: "unit" }, panel.unit));
  return make("div", { class: "panel card" }, title, svg, legend);
}

function nearest(points, step) {
  return points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));
}

// sections of curves, the pictures after the first
function curves() {
  const slider = make("input", { type: "range", min: 0, max: 95, value: 0, "aria-label": "smoothing of training curves" });
  slider.addEventListener("input", () => {
    smoothing = Number(slider.value);
    redraws.forEach((redraw) => redraw());
  });
  let isFirst = true;
  for (const [name, panels] of Object.entries(data.sections)) {
    heading(name, ...(isFirst ? [make("label", {}, "smoothing", slider)] : []));
    isFirst = false;
    const box = make("div", { class: "panels" });
    for (const panel of panels) box.append(curvePanel(panel));
    if (name === "Latents") for (const panel of unitPanels()) box.append(panel);
    page.append(box);
    if (name === "Learning") pictures();
  }
}
