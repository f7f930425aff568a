const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");

function section(title, ...children) {
  const made = make("section", {}, make("h2", { textContent: title }), ...children);
  main.append(made);
  return made;
}

function listTable(heads, rows, numbers = []) {
  const kind = at => (numbers.includes(at) ? "number" : "");
  const head = make("tr", {}, ...heads.map((text, at) => make("th", { textContent: text, className: kind(at) })));
  const lines = rows.map(row => make("tr", {}, ...row.map((cell, at) =>
    make("td", { className: kind(at) }, cell instanceof Node ? cell : String(cell)))));
  return make("div", { className: "scroll" },
    make("table", { className: "list" }, ...(heads.length ? [make("thead", {}, head)] : []), make("tbody", {}, ...lines)));
}

function command(text) {
  const copy = make("button", { type: "button", textContent: "Copy" });
  const words = make("pre", { textContent: text });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {  // not allowed here: at least it is selected
      getSelection().selectAllChildren(words);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  return make("div", { className: "command" }, words, copy);
}

const day = seconds => new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function span(seconds) {
  const all = Math.round(seconds), hours = Math.floor(all / 3600), minutes = Math.floor(all / 60) % 60;
  const two = number => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(all % 60)}` : `${minutes}:${two(all % 60)}`;
}

function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = size ? Math.min(4, Math.floor(Math.log2(size) / 10)) : 0;
  return `${Number((size / 1024 ** power).toPrecision(3))} ${units[power]}`;
}

const count = number => number.toLocaleString("en");

function heading() {
  const now = data.progress, header = document.querySelector("header");
  const words = { running: "training", done: "done", stopped: "stopped", failed: "failed" };
  const state = make("span", { className: `state ${now.state}`, textContent: words[now.state] });
  header.append(make("div", { className: "top" }, make("h1", { textContent: data.name }), state,
    make("span", { className: "quiet", textContent: now.text })));
  header.append(make("progress", { max: Math.max(1, now.total), value: now.step, title: "steps done" }));
  const left = now.state === "running" && now.pace ? span((now.total - now.step) * now.pace) : null;
  const pairs = [
    ["step", `${count(now.step)} of ${count(now.total)}`],
    ["epoch", `${count(now.epoch)} of ${count(now.epochs)}`],
    ["time", span(now.seconds)],
    ...(now.pace ? [["per step", `${now.pace.toPrecision(3)} s`]] : []),
    ...(left ? [["left", left]] : []),
    ...(now.memory ? [["peak memory", `${now.memory.toFixed(1)} GB`]] : []),
    ...validated(),
    ["written", day(now.written)],
  ];
  header.append(make("dl", { className: "numbers" }, ...pairs.map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })))));
  if (now.state === "running") header.append(reloading());
}

// How far the validation loss is from what it was before the first step.
function validated() {
  const last = name => data.series[`loss/validation/${name}`]?.points.at(-1)?.[1];
  const [change, base, error] = ["difference", "base", "standard error"].map(last);
  if (change === undefined || !base) return [];
  const percent = value => (100 * value / base).toFixed(1);
  const sign = change > 0 ? "+" : "";
  return [["validation loss", `${sign}${percent(change)} %${error === undefined ? "" : ` ± ${percent(error)}`}`]];
}

// While the run goes on: the page on the disk is written again, and a browser shows it when it reloads.
function reloading() {
  const box = make("input", { type: "checkbox", checked: location.hash === "#reload" });
  let timer = null;
  const set = () => {
    clearTimeout(timer);
    history.replaceState(null, "", box.checked ? "#reload" : location.pathname);
    if (box.checked) timer = setTimeout(() => (document.querySelector("dialog[open]") ? set() : location.reload()), 30000);
  };
  box.addEventListener("change", set);
  if (box.checked) set();
  return make("label", { className: "quiet" }, box, " reload every 30 seconds");
}

function samples() {
  if (!data.samples.length) return;
  const steps = [...new Set(data.samples.map(one => one.step))].sort((a, b) => a - b);
  const numbers = [...new Set(data.samples.map(one => one.number))].sort((a, b) => a - b);
  const at = new Map(data.samples.map(one => [`${one.number} ${one.step}`, one]));
  const latest = number => data.samples.filter(one => one.number === number).pop().prompt;
  const cell = one => one && { src: one.src, name: one.prompt, file: one.href,
    facts: [one.step ? `step ${count(one.step)}, epoch ${count(one.epoch)}` : "before the first step", one.prompt] };
  const made = section("Samples");
  gallery(made, [{
    title: "", corner: "", columns: steps.map(step => (step ? `step ${count(step)}` : "before")), rows: numbers.map(latest),
    cells: numbers.map(number => steps.map(step => cell(at.get(`${number} ${step}`)))),
  }], innerWidth < 640 ? 104 : 160);
  const sheet = made.querySelector(".sheet");
  sheet.scrollLeft = sheet.scrollWidth;  // the newest ones
  if (data.samples_left_out) made.append(make("p", { className: "quiet", textContent:
    `${count(data.samples_left_out)} images in between are left out here, to keep this page small; all are in the folder of the samples.` }));
}

const PANELS = [  // title, which series, whether the control smooths them
  ["Loss", name => name === "loss/current", true],
  ["Validation loss", name => name === "loss/validation" || name === "loss/validation/base" || name.startsWith("loss/validation of "), false],
  ["Validation loss by timesteps", name => name.startsWith("loss/validation t "), false],
  ["Validation loss less that of the base", name => name.startsWith("loss/validation/difference"), false],
  ["Learning rates", name => name.startsWith("lr/"), false],
  ["Gradient norm", name => name.startsWith("norm/"), true],
  ["Seconds per step", name => name === "time/step", true],
];

// "loss/validation/difference t 000-249" to "t 000-249"
function shortName(name) {
  return name.replace(/^(loss|lr|norm|time)\/(validation\/(difference(?= ))?)?(validation (of )?(?=.))?/, "").replace(/^ (of )?/, "");
}

// By step, the standard errors of the differences of this name; null where there are none.
function errorsOf(name) {
  const errors = data.series[name.replace("/difference", "/standard error")];
  return name.includes("/difference") && errors ? new Map(errors.points) : null;
}

function curves() {
  const known = Object.entries(data.series).filter(([, one]) => one.points.length);
  if (!known.length) return;
  const longest = Math.max(...known.map(([, one]) => one.points.length));
  const slider = make("input", { type: "range", min: 0, max: 99, value: longest > 1000 ? 98 : longest > 200 ? 95 : 90 });
  const shown = make("span");
  const charts = make("div", { className: "charts" });
  const made = section("Curves", make("div", { className: "tools" }, make("label", {}, "smoothing", slider, shown)), charts);
  const draw = () => {
    shown.textContent = (slider.value / 100).toFixed(2);
    charts.replaceChildren();
    for (const [title, wanted, smooth] of PANELS) {
      const chosen = known.filter(([name]) => wanted(name)).map(([name, one]) =>
        ({ name: shortName(name), points: one.points, smooth, errors: errorsOf(name) }));
      if (chosen.length) chart(charts, title, chosen, data.resumed, smooth ? slider.value / 100 : 0);
    }
  };
  slider.addEventListener("input", draw);
  draw();
  const thinned = Math.max(...known.map(([, one]) => one.per));
  if (thinned > 1) made.append(make("p", { className: "quiet", textContent: `A point of the longest curves is the mean of ${thinned} values.` }));
}

function files() {
  if (!data.files.length) return;
  section("Saved files", listTable(["file", "epoch", "step", "size", "saved"], data.files.map(one =>
    [make("a", { href: one.href, textContent: one.name }),
      count(one.epoch), count(one.step), bytes(one.size), day(one.time)]), [1, 2, 3]));
}

function commands() {
  const parts = data.use.flatMap(([title, text]) => [make("h3", { textContent: title }), command(text)]);
  section("Use and repeat", ...parts, make("h3", { textContent: "Repeat this run" }), command(data.command),
    make("p", { className: "quiet", textContent: data.command_note }));
}

function about() {
  section("The run", listTable([], data.about));
}

function dataSet() {
  const lines = make("ul", { className: "plain" }, ...data.data.lines.map(text => make("li", { textContent: text })));
  const made = section("Data", lines);
  for (const { title, images, more } of data.data.groups) {
    made.append(make("h3", { textContent: title }));
    made.append(make("div", { className: "leftouts" }, ...images.map(one => make("figure", {},
      make("div", { className: "frame" }, one.src ? make("img", { src: one.src, alt: "" }) : "no image"),
      make("figcaption", {}, make("div", { textContent: one.name }), make("div", { className: "quiet", textContent: one.why }))))));
    if (more) made.append(make("p", { className: "quiet", textContent: `and ${count(more)} more` }));
  }
}

function settings() {
  const shown = value => (Array.isArray(value) ? value.join(" ") : String(value));
  section("Settings", listTable(["given", "value", "by"], data.settings.given.map(([name, value, by]) => [name, shown(value), by])),
    make("details", {}, make("summary", { textContent: `${data.settings.defaults.length} defaults` }),
      listTable(["default", "value"], data.settings.defaults.map(([name, value]) => [name, shown(value)]))));
}

[heading, samples, curves, files, commands, about, dataSet, settings].forEach(part => part());
