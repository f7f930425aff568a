"use strict";

// An element with properties and children; texts become text, never markup.
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

// Tables of images, with zoom on a click, and two of them over each other.
// tables: {title, corner, columns: [label], rows: [label], cells: [[{src, name, facts: [line], file} or null]]}
function gallery(parent, tables, size = 160) {
  const shown = [], buttons = new Map();
  const slider = make("input", { type: "range", min: 48, max: 640, value: size, title: "size of the images" });
  const compare = make("button", { type: "button", textContent: "Compare two", ariaPressed: "false" });
  const hint = make("span", { className: "quiet", textContent: "Click an image to enlarge it." });
  parent.append(make("div", { className: "tools" }, make("label", {}, "size", slider), compare, hint));
  const resize = () => document.documentElement.style.setProperty("--size", `${slider.value}px`);
  slider.addEventListener("input", resize);
  resize();
  const viewer = makeViewer(shown);
  document.body.append(viewer.dialog);

  let picked = [];
  const pick = on => {
    picked = [];
    buttons.forEach(button => button.classList.remove("picked"));
    parent.classList.toggle("picking", on);
    compare.ariaPressed = String(on);
    hint.textContent = on ? "Click the two images." : "Click an image to enlarge it.";
  };
  compare.addEventListener("click", () => pick(!parent.classList.contains("picking")));
  const chosen = cell => {
    if (!parent.classList.contains("picking")) return viewer.show(shown.indexOf(cell));
    if (!picked.includes(cell)) picked.push(cell);
    buttons.get(cell).classList.add("picked");
    if (picked.length === 2) {
      const both = picked;
      pick(false);
      viewer.compare(...both);
    }
  };
  for (const table of tables) parent.append(...makeTable(table, shown, buttons, chosen));
}

function makeTable(table, shown, buttons, chosen) {
  const head = make("tr", {}, make("th", { textContent: table.corner }),
    ...table.columns.map(label => make("th", { textContent: label })));
  const rows = table.cells.map((cells, row) => make("tr", {}, make("th", { scope: "row", textContent: table.rows[row] }),
    ...cells.map(cell => {
      if (!cell) return make("td");
      const image = make("img", { src: cell.src, alt: cell.name, loading: "lazy", title: cell.facts.join("\n") });
      const button = make("button", { type: "button" }, image);
      button.addEventListener("click", () => chosen(cell));
      shown.push(cell);
      buttons.set(cell, button);
      return make("td", {}, button);
    })));
  const parts = table.columns.length ? [make("thead", {}, head)] : [];
  const sheet = make("div", { className: "sheet" }, make("table", {}, ...parts, make("tbody", {}, ...rows)));
  return table.title ? [make("h3", { textContent: table.title }), sheet] : [sheet];
}

function makeViewer(shown) {
  const first = make("img", { alt: "" }), second = make("img", { alt: "", className: "second" });
  const edge = make("div", { className: "edge" });
  const frame = make("div", { className: "frame" }, first, second, edge);
  const words = make("p", { className: "one" }), left = make("p"), right = make("p");
  const slider = make("input", { type: "range", className: "at", min: 0, max: 1000, value: 500, title: "the border" });
  const button = (text, label, work) => {
    const made = make("button", { type: "button", textContent: text, ariaLabel: label });
    made.addEventListener("click", work);
    return made;
  };
  const link = make("a", { textContent: "open the file", target: "_blank" });
  const dialog = make("dialog", { className: "viewer" }, frame, slider, words,
    make("div", { className: "both" }, left, right),
    make("div", { className: "row" },
      make("span", { className: "row one" }, button("◀", "the previous image", () => show(at - 1)),
        button("▶", "the next image", () => show(at + 1)), link),
      button("Close", "close", () => dialog.close())));
  let at = 0;
  const fit = () => {
    const [wide, high] = [frame.clientWidth, frame.clientHeight], [w, h] = [first.naturalWidth, first.naturalHeight];
    const width = w && h ? Math.min(wide, high * w / h) : wide;
    return [(wide - width) / 2, width];
  };
  const divide = () => {
    const [start, width] = fit(), x = start + width * slider.value / 1000;
    second.style.clipPath = `inset(0 0 0 ${x}px)`;
    edge.style.left = `${x}px`;
  };
  const drag = event => {
    if (!dialog.classList.contains("comparing") || (event.type === "pointermove" && !event.buttons)) return;
    const [start, width] = fit();
    slider.value = 1000 * (event.clientX - frame.getBoundingClientRect().left - start) / width;
    divide();
  };
  const open = comparing => {
    dialog.classList.toggle("comparing", comparing);
    if (!dialog.open) dialog.showModal();
  };
  // Without blurring pixels of images that are far smaller than the screen.
  first.addEventListener("load", () => { frame.classList.toggle("small", first.naturalHeight <= 128); divide(); });
  function show(place) {
    at = (place + shown.length) % shown.length;
    first.src = shown[at].src;
    words.textContent = shown[at].facts.join("\n");
    link.hidden = !shown[at].file;
    if (shown[at].file) link.href = shown[at].file;
    open(false);
  }
  function compare(one, other) {
    [first.src, second.src] = [one.src, other.src];
    [left.textContent, right.textContent] = [one.facts.join("\n"), other.facts.join("\n")];
    slider.value = 500;
    open(true);
    divide();
  }
  slider.addEventListener("input", divide);
  frame.addEventListener("pointerdown", drag);
  frame.addEventListener("pointermove", drag);
  frame.addEventListener("click", () => { if (!dialog.classList.contains("comparing")) dialog.close(); });
  window.addEventListener("resize", divide);
  document.addEventListener("keydown", event => {
    if (!dialog.open || dialog.classList.contains("comparing")) return;
    if (event.key === "ArrowRight") show(at + 1);
    if (event.key === "ArrowLeft") show(at - 1);
  });
  return { dialog, show, compare };
}
