// What the page shows of one image: warnings first, then the flag, the numbers, and what is similar.
//
//     entry {number, name, url, state, reply | problem}, card, voice  ->  the children of its <article>

import { make, makeBar } from "./parts.js";

export function drawResult(entry, card, voice, actions) {
  const { words } = voice;
  const buttons = make("div", { class: "buttons" },
    entry.reply && button(words.print, actions.print), button(words.remove, actions.remove));
  const head = make("header", {}, make("h2", { tabindex: "-1" }, words.image(entry.number)),
    make("p", { class: "file soft" }, entry.name), buttons);
  if (entry.state === "failed") return [head, warn(null, tellProblem(entry.problem, card, words))];
  if (entry.reply === null) return [head, make("p", { class: "soft" }, words[entry.state])];
  const { reply } = entry;
  const doubtful = reply.is_outlier || reply.modality_unexpected;
  return [head,
    make("div", { class: "columns" }, drawPicture(entry, card, words),
      make("div", { class: "told" }, drawWarnings(reply, card, voice),
        make("div", { class: `numbers${doubtful ? " doubtful" : ""}${reply.is_outlier ? " outlier" : ""}` },
          drawFlag(reply, card, voice), drawProbabilities(reply, card, voice), drawDistance(reply, card, voice)))),
    drawSimilar(reply, voice), drawPrinted(card, voice)];
}

// One sentence for people who hear the page.
export function tellResult(entry, card, voice) {
  const { words } = voice;
  if (entry.state === "failed") return tellProblem(entry.problem, card, words);
  if (entry.state !== "done") return words.reading;
  const { reply } = entry;
  return [words.done(entry.number, reply.top, voice.percent(reply.probabilities[reply.top])),
    reply.is_outlier && `${words.outlier_title}.`, reply.modality_unexpected && `${tellModality(reply, card, voice)}.`,
    words.research].filter(Boolean).join(" ");
}

function button(text, action) {
  const element = make("button", { type: "button" }, text);
  element.addEventListener("click", action);
  return element;
}

const warn = (title, text) => make("div", { class: "alert", role: "note" }, title && make("strong", {}, title), make("p", {}, text));
const tellProblem = (problem, card, words) => problem === "too_large" ? words.too_large(Math.floor(card.max_bytes / 2 ** 20)) : words[problem];
const tellModality = (reply, card, voice) => voice.words.modality_title(voice.modality(reply.modality)[0], voice.modality(card.modality)[1]);

function drawPicture(entry, card, words) {
  const image = make("img", { src: entry.url, alt: words.preview }), frame = make("div", { class: "frame" }, image);
  const figure = make("figure", { class: "picture" }, frame);
  image.addEventListener("error", () => figure.replaceChildren(make("p", { class: "soft no-preview" }, words.no_preview)));
  image.addEventListener("load", () => {
    if (markSquare(frame, image, card.seen_share)) figure.append(make("figcaption", { class: "soft" }, words.seen));
  });
  return figure;
}

// The square in the middle that the transform cuts out, whatever way up the browser turns the image. False: all of it.
function markSquare(frame, image, share) {
  const { naturalWidth: width, naturalHeight: height } = image, side = share * Math.min(width, height);
  if (side > 0.995 * Math.max(width, height)) return false;
  const square = make("span", { class: "square", "aria-hidden": "true" });
  square.style.width = `${100 * side / width}%`;
  square.style.height = `${100 * side / height}%`;
  frame.append(square);
  return true;
}

function drawWarnings(reply, card, voice) {
  const { words } = voice;
  return [reply.is_outlier && warn(words.outlier_title, words.outlier),
    reply.modality_unexpected && warn(tellModality(reply, card, voice), words.modality)];
}

function drawFlag(reply, card, voice) {
  const { words } = voice, rule = card.threshold_card;
  if (rule === null) {
    return make("div", { class: "flag none" }, make("p", { class: "verdict" }, `${words.no_flag}.`),
      card.threshold_reason && make("p", { class: "soft", lang: "en" }, card.threshold_reason));
  }
  const value = voice.percent(reply.uncorrected[rule.positive]), threshold = voice.percent(rule.threshold);
  const rate = reply.flagged ? rule.specificity.value : rule.sensitivity.value;
  const means = reply.flagged ? words.flagged_means : words.unflagged_means;
  return make("div", { class: reply.flagged ? "flag raised" : "flag" },
    make("p", { class: "verdict" }, (reply.flagged ? words.flagged : words.unflagged)(rule.positive, value, threshold)),
    rate !== null && make("p", {}, means(voice.roundPercent(1 - rate), rule.positive)),
    reply.corrected_for && make("p", { class: "soft" }, words.before_correction));
}

function drawProbabilities(reply, card, voice) {
  const { words } = voice, rule = card.threshold_card;
  // The mark belongs to the probability before the correction, and would mislead beside a corrected one.
  const marked = reply.corrected_for === null && rule !== null ? rule.positive : null;
  const ranked = Object.entries(reply.probabilities).sort((one, other) => other[1] - one[1]);
  const rows = ranked.map(([name, value]) => make("tr", { class: name === reply.top ? "top" : null, "data-value": value },
    make("th", { scope: "row" }, name), make("td", { class: "value" }, voice.percent(value)),
    make("td", { class: "drawn" }, makeBar(value, name === marked ? rule.threshold : null))));
  const heads = [words.class, words.probability, ""].map(text => text ? make("th", { scope: "col" }, text) : make("td"));
  return make("section", {}, make("h3", {}, words.probabilities),
    reply.corrected_for && make("p", { class: "corrected" },
      words.corrected(card.positive, voice.percent(reply.corrected_for[card.positive]))),
    make("table", { class: "probabilities" }, make("thead", { class: "heard" }, make("tr", {}, heads)), make("tbody", {}, rows)),
    make("p", { class: "soft small" }, [words.closed, marked && `${capitalise(words.threshold_mark(voice.percent(rule.threshold)))}.`]
      .filter(Boolean).join(" ")));
}

const capitalise = text => text.charAt(0).toUpperCase() + text.slice(1);

function drawDistance(reply, card, voice) {
  const { words } = voice, { threshold, quantile } = card.outlier;
  return make("section", { class: "distance" }, make("h3", {}, words.distance),
    makeBar(reply.outlier_score / (2 * threshold), 0.5),
    make("p", { class: "soft small" },
      words.distance_of(voice.number(reply.outlier_score), voice.number(threshold), voice.roundPercent(quantile))));
}

function drawSimilar(reply, voice) {
  const { words } = voice;
  if (!reply.similar.length) return make("p", { class: "soft small" }, words.no_cases);
  const cases = reply.similar.map((similar, place) => make("li", {},
    make("img", { src: similar.thumbnail, alt: words.case(place + 1, similar.label) }),
    make("strong", {}, similar.label), make("small", {}, words.similarity(voice.number(similar.similarity)))));
  return make("section", { class: "similar" }, make("h3", {}, words.similar),
    make("p", { class: "soft small" }, words.similar_why), make("ol", {}, cases));
}

// On paper only: which classifier said so, and a line for a hand; a file's name may be a person's and is not printed.
function drawPrinted(card, voice) {
  const { words } = voice;
  return make("div", { class: "printed" }, make("p", { class: "alert" }, `${words.research} ${words.research_why}`),
    make("p", {}, words.printed(card.name, card.version, voice.date(new Date()))), make("p", {}, words.reference, make("span", { class: "line" })));
}
