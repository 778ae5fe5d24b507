// What the page says of the classifier itself: what it was fitted on, its threshold, and when not to believe it.

import { make } from "./parts.js";

export function drawAbout(card, voice, share, setShare) {
  return [drawFitted(card, voice), drawThreshold(card, voice), card.positive !== null && drawClinic(card, voice, share, setShare),
    drawEncoder(card, voice)].filter(Boolean);
}

export function drawDoubts(card, voice) {
  const expected = card.modality === null ? null : voice.modality(card.modality)[0];
  return voice.words.doubts(voice.list(card.classes), expected, card.knows_modalities)
    .map(text => make("li", {}, text));
}

function drawFitted(card, voice) {
  const { words } = voice, { fitted_on: fitted } = card;
  const count = value => typeof value === "number" ? voice.count(value) : "–";
  const known = typeof fitted.patients === "number";
  const rows = card.classes.map(name => make("tr", {}, make("th", { scope: "row" }, name),
    make("td", {}, count(fitted.by_class?.[name]?.images)), known && make("td", {}, count(fitted.by_class?.[name]?.patients))));
  const heads = [words.class, words.images, known && words.patients].filter(Boolean);
  return make("section", {}, make("h3", {}, words.fitted),
    make("p", {}, words.fitted_on(count(fitted.images), known ? count(fitted.patients) : null), " ",
      card.modality && words.of_modality(voice.modality(card.modality)[1])),
    make("table", {}, make("thead", {}, make("tr", {}, heads.map(text => make("th", { scope: "col" }, text)))), make("tbody", {}, rows)));
}

function drawThreshold(card, voice) {
  const { words } = voice, rule = card.threshold_card;
  if (rule === null) {
    return make("section", {}, make("h3", {}, words.threshold), make("p", {}, `${words.no_flag}.`),
      card.threshold_reason && make("p", { class: "soft", lang: "en" }, card.threshold_reason));
  }
  const number = value => words[card.fitted_on.grouping === "patient" ? "num_patients" : "num_images"](voice.count(value));
  const tell = rate => rate.value === null ? words.undefined_rate
    : rate.low === null || rate.high === null ? words.rate_bare(voice.percent(rate.value), number(rate.n))
    : words.rate(voice.percent(rate.value), voice.percent(rate.low), voice.percent(rate.high), number(rate.n));
  return make("section", {}, make("h3", {}, words.threshold),
    make("p", {}, words.threshold_is(rule.positive, voice.percent(rule.threshold)), " ",
      words.chosen_for(words[rule.wanted].toLowerCase(), voice.roundPercent(rule.target))),
    make("dl", {}, make("dt", {}, words.sensitivity), make("dd", {}, tell(rule.sensitivity)),
      make("dt", {}, words.specificity), make("dd", {}, tell(rule.specificity))),
    make("p", { class: "soft small" }, card.fitted_on.grouping === "patient" ? words.measured : words.measured_images, " ", words.locked));
}

function drawClinic(card, voice, share, setShare) {
  const { words } = voice, name = card.positive;
  const field = make("input", { id: "share", type: "number", min: "0", max: "100", step: "any", inputmode: "decimal", required: true,
    value: share === null ? null : +(100 * share).toPrecision(12), "aria-describedby": "share-problem" });
  const problem = make("p", { id: "share-problem", class: "problem", role: "alert" });
  const reset = make("button", { type: "button", disabled: share === null }, words.reset);
  const form = make("form", { novalidate: true }, make("label", { for: "share" }, words.clinic_share(name)),
    make("div", { class: "buttons" }, field, make("button", { type: "submit" }, words.apply), reset), problem);
  form.addEventListener("submit", event => {
    event.preventDefault();
    const value = field.valueAsNumber / 100;
    if (value > 0 && value < 1) setShare(value);
    else problem.textContent = words.bad_share;
  });
  reset.addEventListener("click", () => setShare(null));
  return make("section", { class: "clinic" }, make("h3", {}, words.clinic),
    make("p", {}, words.clinic_why(name, voice.percent(card.prevalence[name]))), form);
}

function drawEncoder(card, voice) {
  const { words } = voice, { licences, name } = card.encoder;
  return make("section", {}, make("h3", {}, words.encoder), make("p", { class: "soft small" }, name ?? "–",
    ". ", words.made_with(card.panfm_version), " ", Array.isArray(licences) && licences.length ? `${words.licences(licences.join(", "))}.` : null),
    voice.language === "en" && make("p", { class: "soft small" }, card.warning));
}
