// The page of a task: specs and rows that Python computed in, drawings out. Its tables need no script.
function start() {
  const drawn = JSON.parse(document.getElementById("task-data").textContent);
  for (const [id, { spec, data }] of Object.entries(drawn)) {
    const holder = document.getElementById(id);
    if (window.vegaEmbed) { drawings.show(holder, spec, data); continue; }
    const note = document.createElement("p");
    note.className = "banner";
    note.textContent = "The drawing needs the file assets/vega.js of this board. Its numbers stand below.";
    holder.replaceChildren(note);
  }
}

document.addEventListener("DOMContentLoaded", start);
