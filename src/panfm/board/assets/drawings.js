"use strict";
// Drawings: a spec of figures.py and its rows in, SVG in the reader's colours out. Nothing is evaluated as code (the
// library's own interpreter runs expressions), nothing moves, and a change of scheme or width draws again.
const drawings = (() => {
  const DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]; // as vega.py: one encoder from another without colour
  const NUM_SERIES = 8, MARGIN = 60; // pixels beside a small multiple for its axis, where its spec names no others
  const shown = new Map(); // element -> how to draw it again

  const readColour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // As vega.paint: each encoder of the rows gets its colour and dashes, in the colours of this page.
  function paint(spec, rows) {
    const series = new Map(rows.filter(row => "series" in row).map(row => [row.encoder, row.series]));
    const colours = Array.from({ length: NUM_SERIES }, (_, number) => readColour(`s${number}`));
    const view = spec.spec ?? spec;
    for (const { encoding = {} } of [view, ...(view.layer ?? [])]) {
      for (const [channel, values] of [["color", colours], ["strokeDash", DASHES]]) {
        if (encoding[channel]?.field !== "encoder" || !series.size) continue;
        const range = [...series.values()].map(number => values[number % values.length]);
        encoding[channel].scale = { domain: [...series.keys()], range };
      }
    }
  }

  // Ink, soft and line are those of paper in the spec: its parameters say which.
  function recolour(spec) {
    let config = JSON.stringify(spec.config);
    for (const one of spec.params) {
      config = config.replaceAll(one.value, readColour(one.name));
      one.value = readColour(one.name);
    }
    spec.config = JSON.parse(config);
  }

  function fit(spec, width) {
    const { cell, square, margin = cell ? MARGIN : 200 } = spec.usermeta; // names stand at the left, bars at the right
    spec.config.legend.symbolOpacity = 1;
    spec.config.legend.columns = Math.max(1, Math.floor(width / 220));
    if (cell) {
      spec.columns = Math.max(1, Math.floor(width / (cell + margin)));
      spec.spec.width = Math.max(160, Math.min(360, width / spec.columns - margin));
    } else if (square) spec.width = spec.height = Math.max(160, Math.min(340, width - 40));
    else spec.width = Math.max(160, Math.min(760, width - margin));
  }

  async function draw(element, spec, data) {
    const own = structuredClone(spec), picture = element.querySelector(".picture");
    recolour(own);
    paint(own, Object.values(data).flat());
    fit(own, element.clientWidth);
    own.datasets = structuredClone(data);
    const tooltip = { disableDefaultStyle: true };
    const options = { ast: true, renderer: "svg", actions: false, mode: "vega-lite", defaultStyle: false, tooltip };
    await window.vegaEmbed(picture, own, options);
  }

  function drawAgain() {
    for (const [element, again] of shown) if (element.isConnected) again(); else shown.delete(element);
  }

  // data: {rows, ...}, by the names that the spec gives its data.
  function show(element, spec, data) {
    const picture = document.createElement("div");
    picture.className = "picture";
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", spec.usermeta.label);
    element.replaceChildren(picture);
    shown.set(element, () => draw(element, spec, data));
    return draw(element, spec, data);
  }

  let waiting;
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAgain, 200); });
  return { show };
})();
