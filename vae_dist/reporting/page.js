"use strict";
// Draws the page from the JSON in #data: {runs, sections, pictures}. Plain DOM and SVG.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const several = runs.length > 1;
const COLORS = ["#2f6fde", "#e07b1a", "#1a9a72", "#b5449b", "#8c6d1f", "#5b5fc7", "#c9372c", "#3f8fa8"];
const color = (i) => COLORS[i % COLORS.length];
const page = document.getElementById("page");
const redraws = []; // of the curve panels, when the smoothing changes
let smoothing = 0;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value) {
  if (value === null || value === undefined || !isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (!isFinite(seconds) || seconds <= 0) return "-";
  const s = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return s + "s";
  if (s < 3600) return Math.floor(s / 60) + "m " + two(s % 60) + "s";
  return Math.floor(s / 3600) + "h " + two(Math.floor((s % 3600) / 60)) + "m";
}

const last = (run, key) => (run.curves[key] || []).map((p) => p[1]).at(-1);

function heading(text, ...more) {
  const line = make("div", { class: "bar" }, make("h2", {}, text), ...more);
  page.append(line);
}

// the top: names, state, the figures that matter

function chip(run) {
  const status = run.status.status || "unknown";
  return make("span", { class: "chip " + status }, status);
}

function trainingSeconds(run) {
  const points = run.curves["time/step_seconds"] || [];
  let before = 0;
  let sum = 0;
  for (const [step, seconds] of points) {
    sum += (step - before) * seconds;
    before = step;
  }
  return sum;
}

function figuresOf(run) {
  const step = Math.max(run.status.step ?? 0, run.curves["train/loss"]?.at(-1)?.[0] ?? 0);
  const speed = (run.curves["time/images_per_second"] || []).map((p) => p[1]).sort((a, b) => a - b);
  return [
    ["-ELBO", number(last(run, "eval/neg_elbo_nats")), "nats/image"],
    ["Bits/dim", number(last(run, "eval/bits_per_dim")), "validation"],
    ["Distortion", number(last(run, "eval/distortion_nats")), "nats/image"],
    ["Rate", number(last(run, "eval/rate_nats")), "nats/image"],
    ["Active units", number(last(run, "latent/active_units")), "of " + (run.distributions["latent/kl_nats_per_unit"]?.at(-1)?.[1].length ?? "-")],
    ["Steps", number(step), step < run.steps ? "of " + number(run.steps) : "all done"],
    ["Images/s", number(speed[speed.length >> 1]), "median"],
    ["Training", duration(trainingSeconds(run)), "time in steps"],
  ];
}

function summary() {
  const header = make("header");
  page.append(header);
  if (!several) {
    const [run] = runs;
    const session = run.sessions.at(-1) || {};
    const parts = [run.config.config?.[0] && "config " + run.config.config[0], session.device, session.started];
    header.append(
      make("h1", {}, run.name, chip(run)),
      make("div", { class: "under" }, parts.filter(Boolean).join("  ·  ")),
    );
    const figures = make("div", { class: "figures" });
    for (const [name, value, unit] of figuresOf(run))
      figures.append(make("div", { class: "figure card" }, make("span", {}, name), make("b", {}, value), make("span", {}, unit)));
    header.append(figures);
    return;
  }
  header.append(make("h1", {}, runs.length + " runs side by side"), make("div", { class: "under" }, "lowest -ELBO first in the table"));
  const head = make("tr", {}, make("th", {}, "run"));
  for (const [name] of figuresOf(runs[0])) head.append(make("th", { class: "number" }, name));
  const body = make("tbody");
  const order = runs.map((run, i) => [last(run, "eval/neg_elbo_nats") ?? Infinity, i]).sort((a, b) => a[0] - b[0]);
  for (const [, i] of order) {
    const row = make("tr", {}, make("td", {}, dot(i), runs[i].name, chip(runs[i])));
    for (const [, value] of figuresOf(runs[i])) row.append(make("td", { class: "number" }, value));
    body.append(row);
  }
  header.append(make("div", { class: "card scroll" }, make("table", {}, make("thead", {}, head), body)));
}

function dot(i) {
  return make("span", { class: "dot", style: "background:" + color(i) });
}

// pictures and distributions over time: one slider each, the latest first

function timeline(steps, show) {
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "step" });
  const output = make("output");
  const play = make("button", { type: "button", title: "play" }, "▶");
  let timer = 0;
  function update() {
    const step = steps[Number(slider.value)];
    output.textContent = "step " + number(step);
    show(step);
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "▶";
  }
  slider.addEventListener("input", () => { stop(); update(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = -1;
    play.textContent = "❚❚";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      update();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 450);
  });
  update();
  return steps.length > 1 ? make("div", { class: "time" }, play, slider, output) : "";
}

const union = (lists) => [...new Set(lists.flat())].sort((a, b) => a - b);
// what a run had at a step: its latest until then, else its first
const until = (items, step, at) => items.filter((item) => at(item) <= step).at(-1) ?? items[0];

function pictureCard(name) {
  const [title, why] = data.pictures[name] || [name, ""];
  const owners = runs.map((run, i) => [run, i]).filter(([run]) => (run.pictures[name] || []).length);
  if (!owners.length) return null;
  const shown = make("div", { class: "shown" });
  const views = owners.map(([run, i]) => {
    const image = make("img", { alt: title + " of " + run.name });
    const caption = make("figcaption");
    shown.append(make("figure", {}, image, caption));
    return { frames: run.pictures[name], image, caption, run, i };
  });
  const steps = union(views.map((view) => view.frames.map((frame) => frame.step)));
  const line = timeline(steps, (step) => {
    for (const view of views) {
      const frame = until(view.frames, step, (f) => f.step);
      view.image.src = frame.uri;
      view.image.width = frame.width;
      view.image.height = frame.height;
      view.image.style.maxWidth = frame.width + "px";
      view.caption.replaceChildren(...(several ? [dot(view.i), view.run.name + "  ·  "] : []), frame.caption.replaceAll(" | ", "  ·  "));
    }
  });
  return make("div", { class: "picture card", id: "picture-" + name }, make("h3", {}, title), make("div", { class: "why" }, why), line, shown);
}

function pictures() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.pictures)))];
  if (!names.length) return;
  heading("Pictures");
  const box = make("div", { class: several ? "pictures several" : "pictures" });
  for (const name of names) {
    const card = pictureCard(name);
    if (card) box.append(card);
  }
  page.append(box);
}

function unitPanels() {
  const key = "latent/kl_nats_per_unit";
  return runs
    .map((run, i) => [run, i])
    .filter(([run]) => (run.distributions[key] || []).length)
    .map(([run, i]) => {
      const W = 300, H = 158, L = 42, R = 8, T = 8, B = 22;
      const items = run.distributions[key];
      const high = Math.max(1e-6, ...items.flatMap(([, values]) => values)) * 1.05;
      const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "rate per latent unit" });
      for (const t of ticks(0, high, 4)) {
        const at = T + (1 - t / high) * (H - T - B);
        svg.append(draw("line", { class: "gridline", x1: L, x2: W - R, y1: at, y2: at }));
        svg.append(draw("text", { x: L - 6, y: at + 4, "text-anchor": "end" }, number(t)));
      }
      svg.append(draw("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }));
      svg.append(draw("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, "units, most used first"));
      const bars = draw("g");
      svg.append(bars);
      const line = timeline(items.map(([step]) => step), (step) => {
        const values = [...until(items, step, (item) => item[0])[1]].sort((a, b) => b - a);
        const width = (W - L - R) / values.length;
        bars.replaceChildren(
          ...values.map((value, k) => {
            const size = Math.max(0, (Math.min(value, high) / high) * (H - T - B));
            return draw("rect", { x: L + k * width + width * 0.08, y: H - B - size, width: width * 0.84, height: size, fill: several ? color(i) : COLORS[0] });
          }),
        );
      });
      const title = make("h3", {}, "Rate per latent unit", make("span", { class: "unit" }, "nats/image" + (several ? ", " + run.name : "")));
      return make("div", { class: "panel card" }, title, svg, line);
    });
}

// config, results, environment

function table(head, rows) {
  const heads = make("tr", {}, ...head.map((text) => make("th", {}, text)));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, heads), make("tbody", {}, ...rows)));
}

function configuration() {
  heading("Config");
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const head = ["key", ...(several ? runs.map((run) => run.name) : ["value"])];
  function row(key) {
    const values = runs.map((run) => run.config[key] || ["-", true]);
    const differs = several && new Set(values.map(([value]) => value)).size > 1;
    const cells = values.map(([value, isDefault]) => make("td", { class: isDefault ? "value default" : "value" }, value));
    return make("tr", differs ? { class: "differs" } : {}, make("td", { class: "key" }, key), ...cells);
  }
  const differing = keys.filter((key) => new Set(runs.map((run) => (run.config[key] || ["-"])[0])).size > 1);
  const chosen = keys.filter((key) => runs.some((run) => !(run.config[key] || ["", true])[1]));
  const first = several ? differing : chosen;
  const note = several ? "Keys in which the runs differ." : "Keys that differ from the defaults.";
  page.append(make("p", { class: "note" }, first.length ? note : "All keys are at their defaults."));
  if (first.length) page.append(make("div", { class: "card" }, table(head, first.map(row))));
  page.append(make("details", { class: "card" }, make("summary", {}, "All " + keys.length + " keys"), table(head, keys.map(row))));
}

function results() {
  const found = runs.flatMap((run, i) => run.results.filter((one) => one.figures).map((one) => [run, i, one]));
  if (!found.length) return;
  heading("Results");
  for (const [run, i, { figures, ...about }] of found) {
    const images = figures.num_images ? number(figures.num_images) + " images" : "";
    const words = ["step " + number(about.step), about.weights + " weights", about.precision, about.data, images].filter(Boolean).join("  ·  ");
    const rows = Object.entries(figures).map(([key, value]) =>
      make("tr", {}, make("td", { class: "key" }, key), make("td", { class: "number" }, number(value))));
    page.append(make("p", { class: "note" }, ...(several ? [dot(i), run.name + ": "] : []), words));
    page.append(make("div", { class: "card" }, table(["figure", ""], rows)));
  }
}

function environment() {
  if (!runs.some((run) => run.sessions.length)) return;
  heading("Environment");
  runs.forEach((run, i) => {
    if (!run.sessions.length) return;
    if (several) page.append(make("p", { class: "note" }, dot(i), run.name));
    const rows = run.sessions.map((s) =>
      make("tr", {},
        make("td", { class: "number" }, number(s.first_step)),
        make("td", {}, s.started),
        make("td", {}, [s.host, s.variables?.SLURM_JOB_ID && "job " + s.variables.SLURM_JOB_ID].filter(Boolean).join(", ")),
        make("td", {}, s.processes + " x " + s.device),
        make("td", {}, make("code", {}, s.git?.commit ? s.git.commit.slice(0, 10) + (s.git.changed ? " + changes" : "") : "-")),
        make("td", {}, make("code", {}, s.command))));
    const versions = Object.entries(run.sessions.at(-1).versions || {}).map(([name, v]) => name + " " + v).join("  ·  ");
    page.append(make("div", { class: "card" }, table(["from step", "started", "host", "devices", "commit", "command"], rows)));
    page.append(make("p", { class: "note", style: "margin-top:8px" }, versions));
  });
}

summary();
curves();
results();
configuration();
environment();
page.append(make("footer", {}, "vae_dist report of " + runs.map((run) => run.folder).join(", ")));
