// Elements. Whatever text comes in (a file's name, a class, an answer) goes in as text, never as markup.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

// A bar from 0 to 1, with a mark where a threshold is. Numbers beside it say the same: it is hidden from screen readers.
export function makeBar(value, mark = null) {
  const fill = make("i"), bar = make("div", { class: "bar", "aria-hidden": "true" }, fill);
  fill.style.width = `${100 * Math.min(value, 1)}%`;  // by script: the page's policy allows no style in markup
  if (mark !== null) {
    const tick = make("b");
    tick.style.left = `${100 * mark}%`;
    bar.append(tick);
  }
  return bar;
}
