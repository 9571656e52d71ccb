"use strict";

const at = (id) => document.getElementById(id);
let picture = null;
let asked = 0;

function say(text) {
  at("message").textContent = text;
}

function refuse(text) {
  at("found").hidden = true; // the last picture's bars aren't this one's
  at("spoken").textContent = "";
  say(text);
}

function choose(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    return refuse(`${file.name || "This"} is not a picture.`);
  }
  picture = file;
  say("");
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = file.name || "The pasted picture";
  preview.hidden = false;
  at("hint").hidden = true;
  at("again").hidden = false;
  classify();
}

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function show(predictions, seconds) {
  at("results").replaceChildren(
    ...predictions.map(({ label, probability }) => {
      const item = document.createElement("li");
      const row = document.createElement("div");
      row.className = "row";
      const name = document.createElement("span");
      name.textContent = label;
      const share = document.createElement("span");
      share.textContent = `${(100 * probability).toFixed(1)} %`;
      row.append(name, share);
      const bar = document.createElement("progress");
      bar.max = 1;
      bar.value = probability;
      bar.setAttribute("aria-hidden", "true"); // the row says it already
      item.append(row, bar);
      return item;
    }),
  );
  const [{ label, probability }] = predictions;
  at("spoken").textContent = `Most probable: ${label}, ${(100 * probability).toFixed(1)} %`;
  at("took").textContent = `${predictions.length} most probable, in ${Math.round(seconds)} ms`;
  at("found").hidden = false;
}

async function classify() {
  const labels = at("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean);
  if (!picture) return say("Choose a picture first.");
  if (!labels.length) return refuse("Write at least one label.");
  const body = new FormData();
  body.append("images", picture, picture.name || "picture");
  body.append("labels", labels.join(","));
  body.append("top_k", "20");
  const turn = ++asked;
  at("go").disabled = true;
  say("");
  try {
    const answer = await fetch("/v1/classify", { method: "POST", body, headers: headers() });
    const found = await answer.json();
    if (turn !== asked) return;
    if (answer.status === 401) {
      at("keyfield").hidden = false;
      at("key").focus();
    }
    if (!answer.ok) return refuse(found.error.message);
    show(found.results[0].predictions, found.timings.total);
    tell();
  } catch (error) {
    if (turn === asked) refuse(`The service can't be reached (${error.message}).`);
  } finally {
    if (turn === asked) at("go").disabled = false;
  }
}

at("preview").addEventListener("error", () => {
  at("preview").hidden = true; // the service says what is wrong with it
  at("hint").hidden = false;
  at("again").hidden = true;
});

async function tell() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (answer.status === 401) at("keyfield").hidden = false;
  if (answer.ok) at("model").textContent = `Model: ${(await answer.json()).models[0].name}.`;
}

at("file").addEventListener("change", (event) => choose(event.target.files[0]));
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
at("labels").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    classify();
  }
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    choose(file);
  }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}
tell();
