// Curves as SVG. series: [{name, points: [[step, value]], smooth: whether the control smooths it,
// errors: what may be added or taken away, by step, or null}]
function chart(parent, title, series, marks, smoothing) {
  const wide = 560, high = 230, left = 62, right = 10, top = 10, bottom = 26;
  const svg = svgNode("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": title });
  const legend = make("div", { className: "legend" });
  parent.append(make("div", { className: "chart" }, make("h3", { textContent: title }), svg, legend));
  const drawn = series.map(one => ({ ...one, curve: one.smooth ? smoothed(one.points, smoothing) : one.points }));
  const steps = drawn.flatMap(one => one.points.map(point => point[0]));
  // What is faint behind a smoothed curve may leave the frame, or one high value would flatten the curve.
  const values = drawn.flatMap(one => one.curve.flatMap(([step, value]) => {
    const error = one.errors?.get(step) ?? 0;
    return [value - error, value + error];
  }));
  const from = Math.min(...bounds(steps)), to = Math.max(from + 1, bounds(steps)[1]);
  const [lowest, highest] = bounds(values), room = (highest - lowest || Math.abs(highest) || 1) * .06;
  const ticks = roundTicks(lowest - (lowest >= 0 ? Math.min(room, lowest) : room), highest + room, 5);
  const low = ticks[0], top_ = ticks[ticks.length - 1];
  const x = step => left + (wide - left - right) * (step - from) / (to - from);
  const y = value => high - bottom - (high - top - bottom) * (value - low) / (top_ - low || 1);
  for (const value of ticks) {
    svg.append(svgNode("line", { class: "grid", x1: left, x2: wide - right, y1: y(value), y2: y(value) }));
    svg.append(svgText(left - 6, y(value) + 4, short(value), "end"));
  }
  const whole = roundTicks(from, to, 6).filter(step => step >= from && step <= to && Number.isInteger(step));
  for (const step of whole) svg.append(svgText(x(step), high - 8, step.toLocaleString("en"), "middle"));
  for (const step of marks.filter(step => step > from && step < to)) {
    const line = svgNode("line", { class: "cursor", x1: x(step), x2: x(step), y1: top, y2: high - bottom });
    line.append(svgNode("title", {}, `resumed after step ${step}`));
    svg.append(line);
  }
  const clip = `clip-${title.replace(/\W/g, "")}`, area = svgNode("clipPath", { id: clip });
  area.append(svgNode("rect", { x: left, y: top, width: wide - left - right, height: high - top - bottom }));
  svg.append(area);
  drawn.forEach((one, number) => {
    const colour = `var(--c${number % 6})`;
    if (one.smooth && smoothing > 0) {
      const all = line(one.points, x, y);
      svg.append(svgNode("path", { class: "faint", d: all, stroke: colour, "clip-path": `url(#${clip})` }));
    }
    if (one.errors) {
      const edge = sign => one.curve.map(([step, value]) => [step, value + sign * (one.errors.get(step) ?? 0)]);
      const band = `${line(edge(1), x, y)}${line(edge(-1).reverse(), x, y).replace("M", "L")}Z`;
      svg.append(svgNode("path", { class: "band", d: band, style: `fill: ${colour}` }));
    }
    svg.append(svgNode("path", { d: line(one.curve, x, y), stroke: colour }));
    if (one.curve.length === 1) {
      const [step, value] = one.curve[0];
      svg.append(svgNode("circle", { cx: x(step), cy: y(value), r: 3, fill: colour }));
    }
  });
  const cursor = svgNode("line", { class: "cursor", y1: top, y2: high - bottom, visibility: "hidden" });
  svg.append(cursor);
  const say = step => {
    legend.replaceChildren(...drawn.map((one, number) => {
      const point = step === null ? one.curve[one.curve.length - 1] : nearest(one.curve, step);
      const dot = make("i");
      dot.style.background = `var(--c${number % 6})`;
      const error = one.errors?.get(point[0]);
      return make("span", {}, dot, `${one.name}: ${short(point[1])}${error === undefined ? "" : ` ± ${short(error)}`}`);
    }), ...(step === null ? [] : [make("span", { className: "quiet", textContent: `step ${step.toLocaleString("en")}` })]));
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * wide / box.width;
    const wanted = from + (to - from) * (at - left) / (wide - left - right);
    const step = nearest(drawn[0].curve, Math.max(from, Math.min(to, wanted)))[0];
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(step));
    cursor.setAttribute("visibility", "visible");
    say(step);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); say(null); });
  say(null);
}

// A running mean whose first values are not drawn towards 0. weight: of what was before, 0 to 1.
function smoothed(points, weight) {
  let sum = 0, weights = 0;
  return points.map(([step, value]) => {
    sum = weight * sum + (1 - weight) * value;
    weights = weight * weights + (1 - weight);
    return [step, sum / weights];
  });
}

function line(points, x, y) {
  return points.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

function bounds(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function roundTicks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const size = power * ([1, 2, 2.5, 5, 10].find(times => times * power >= rough) ?? 10);
  const found = [];
  for (let n = Math.floor(low / size); n <= Math.ceil(high / size); n++) found.push(Number((n * size).toPrecision(12)));
  return found;
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace(/\.?0*e/, "e").replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function svgNode(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function svgText(x, y, text, anchor) {
  return svgNode("text", { x, y, "text-anchor": anchor }, text);
}
