// The page: images come in by drag and drop, by choice or by paste; each is sent to this computer's own server in turn.
//
//     card, voice (language), share (of the class of interest here), entries (newest first)  ->  draw()

import { drawAbout, drawDoubts } from "./about.js";
import { make } from "./parts.js";
import { drawResult, tellResult } from "./result.js";
import { speak } from "./words.js";

const find = id => document.getElementById(id);
const entries = [], waiting = [];
let card = null, voice = speak(chooseLanguage()), share = null, busy = false, number = 0;

function chooseLanguage() {
  const asked = location.hash.slice(1);
  return ["en", "fr"].includes(asked) ? asked : navigator.language.toLowerCase().startsWith("fr") ? "fr" : "en";
}

// Heard always; seen only where the page shows it nowhere else.
function say(text, seen = false) {
  find("status").textContent = text;
  find("status").classList.toggle("heard", !seen);
}

// ---------------------------------------------------------------------------------------------------- images

function addFiles(files) {
  if (!files.length) { say(voice.words.no_file, true); return; }
  for (const file of files) {
    const entry = { number: ++number, name: file.name, file, url: URL.createObjectURL(file), state: "waiting", reply: null, problem: null, article: make("article", { class: "card" }) };
    entries.unshift(entry);
    find("results").prepend(entry.article);
    waiting.push(entry);
    drawEntry(entry);
  }
  askAll();
}

function removeEntry(entry) {
  const next = entry.article.nextElementSibling ?? entry.article.previousElementSibling;
  entries.splice(entries.indexOf(entry), 1);
  if (waiting.includes(entry)) waiting.splice(waiting.indexOf(entry), 1);
  URL.revokeObjectURL(entry.url);
  entry.article.remove();
  say("");
  (next?.querySelector("h2") ?? find("choose")).focus();  // a keyboard must not fall back to the top of the page
}

async function askAll() {
  if (busy) return;
  busy = true;
  while (waiting.length) {
    const entry = waiting.shift();
    entry.state = "reading";
    drawEntry(entry);
    say(voice.words.reading);
    await ask(entry);
    drawEntry(entry);
    if (entries.includes(entry)) say(tellResult(entry, card, voice));
  }
  busy = false;
}

async function ask(entry) {
  const fail = problem => { entry.state = "failed"; entry.problem = problem; entry.reply = null; };
  if (entry.file.size > card.max_bytes) return fail("too_large");
  let data, response;
  try { data = await entry.file.arrayBuffer(); } catch { return fail("unread_file"); }
  const asked = share;
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    response = await fetch(asked === null ? "predict" : `predict?share=${asked}`, { method: "POST", headers, body: data });
    if (!response.ok) return fail("fault");
    entry.reply = await response.json();
  } catch { return fail("stopped"); }
  if (entry.reply.unreadable) fail("unreadable");
  else if (asked === share) entry.state = "done";
  else { waiting.push(entry); entry.state = "waiting"; }  // the share was changed meanwhile
}

function printEntry(entry) {
  entry.article.classList.add("chosen");
  document.body.classList.add("one");
  window.print();
}

window.addEventListener("afterprint", () => {
  document.body.classList.remove("one");
  for (const entry of entries) entry.article.classList.remove("chosen");
});

// ---------------------------------------------------------------------------------------------------- drawing

function drawEntry(entry) {
  entry.article.setAttribute("aria-busy", String(entry.state === "waiting" || entry.state === "reading"));
  const actions = { print: () => printEntry(entry), remove: () => removeEntry(entry) };
  entry.article.replaceChildren(...drawResult(entry, card, voice, actions).filter(Boolean));
}

function draw() {
  const { words, language } = voice;
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = words[element.dataset.word];
  for (const button of document.querySelectorAll("[data-language]"))
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  if (card === null) return;
  document.title = `${card.name} · panfm`;
  find("name").textContent = card.name;
  find("about-line").textContent = words.version(card.version, voice.day(card.created));
  find("about").replaceChildren(...drawAbout(card, voice, share, setShare));
  find("doubts").replaceChildren(...drawDoubts(card, voice));
  entries.forEach(drawEntry);
}

function setShare(value) {
  share = value;
  find("about").replaceChildren(...drawAbout(card, voice, share, setShare));
  find("share").focus();
  for (const entry of entries) {
    if (waiting.includes(entry) || entry.state === "reading" || entry.problem === "too_large") continue;
    entry.state = "waiting";
    waiting.push(entry);
    drawEntry(entry);
  }
  askAll();
}

function setLanguage(language) {
  voice = speak(language);
  history.replaceState(null, "", `#${language}`);  // a page that is loaded again speaks the same
  draw();
  say(entries.length ? tellResult(entries[0], card, voice) : "");
}

// ---------------------------------------------------------------------------------------------------- events

for (const button of document.querySelectorAll("[data-language]"))
  button.addEventListener("click", () => setLanguage(button.dataset.language));

find("choose").addEventListener("click", () => find("file").click());  // a button, since Enter must open it as well
find("file").addEventListener("change", event => {
  addFiles([...event.target.files]);
  event.target.value = "";  // so that the same file can be chosen again
});

// Everywhere, not only on the field: a browser opens an image that is dropped elsewhere, and the results would be gone.
window.addEventListener("dragover", event => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
window.addEventListener("dragleave", event => { if (event.relatedTarget === null) document.body.classList.remove("dragging"); });
window.addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (card !== null) addFiles([...event.dataTransfer.files]);
});
window.addEventListener("paste", event => {
  const files = [...event.clipboardData.files];
  if (files.length && card !== null) addFiles(files);
});

draw();
fetch("card").then(response => response.json()).then(value => { card = value; draw(); }, () => say(voice.words.stopped, true));
