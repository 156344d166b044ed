"use strict";
// Sends the form as one request and shows the answer. Texts become text nodes, so no text of a data set is read as HTML.

const $ = (id) => document.getElementById(id);
const images = [];
let maxImages = 0;
let running = null;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

async function describe() {
  const response = await fetch("/healthz").catch(() => null);
  const health = response ? await response.json() : { status: "unreachable" };
  if (health.status !== "ready") {
    $("model").textContent = health.status === "starting" ? "The server is loading the model…" : "The server cannot be reached.";
    setTimeout(describe, 2000);
    return;
  }
  maxImages = health.pictures ? health.images : 0;
  $("content-field").hidden = !health.texts.includes("content");
  $("pictures-field").hidden = !maxImages;
  $("pictures-hint").textContent = `(optional, up to ${maxImages})`;
  $("k").max = health.max_k;
  $("k").value = Math.min($("k").value, health.max_k);
  const search = health.search === "scann" ? "approximate search" : "exact search";
  $("model").textContent = `${health.labels.toLocaleString()} labels, ${search}` +
    (health.retrieval_augmented ? ", retrieval-augmented" : "");
}

function addImages(files) {
  const added = [...files].filter((file) => file.type.startsWith("image/"));
  if (added.length < files.length) say("Only image files can be added.", true);
  else if (images.length + added.length > maxImages) say(`The model uses at most ${maxImages} images.`, true);
  else say("");
  images.push(...added.slice(0, maxImages - images.length));
  showImages();
}

function showImages() {
  $("thumbnails").replaceChildren(...images.map((file, place) => {
    const item = document.createElement("li");
    const image = document.createElement("img");
    image.alt = "";
    image.src = URL.createObjectURL(file);
    image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
    const remove = element("button", "", "Remove");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.onclick = () => {
      images.splice(place, 1);
      showImages();
      ($("thumbnails").querySelector("button") || $("pictures")).focus();
    };
    item.append(image, element("span", "", file.name), remove);
    return item;
  }));
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.startsWith("data:") ? reader.result : "");
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function ask(signal) {
  const query = { title: $("title").value };
  if (!$("content-field").hidden && $("content").value) query.content = $("content").value;
  if (images.length) query.images = await Promise.all(images.map(asDataUrl));
  const response = await fetch("/v1/predict", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ queries: [query], k: $("k").valueAsNumber }),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(explained(answer.error));
  return answer.answers[0].predictions;
}

function explained(error) {
  const image = /images\[(\d+)\]/.exec(error.field || "");
  const name = image ? images[image[1]]?.name : (error.field || "").split(".").pop();
  return name ? `${name}: ${error.message}` : error.message;
}

function showLabels(labels) {
  $("labels").replaceChildren(...labels.map((found) => {
    const item = document.createElement("li");
    const text = element("span", "text", found.text || found.label);
    text.append(element("span", "uid", found.label));
    const bar = element("div", "bar");
    const filled = document.createElement("div");
    filled.style.width = `${100 * Math.min(Math.max(found.score, 0), 1)}%`;
    bar.append(filled);
    item.append(text, element("span", "score", found.score.toFixed(3)), bar);
    return item;
  }));
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  running?.abort();
  const own = running = new AbortController();
  say("Searching…");
  try {
    const labels = await ask(own.signal);
    if (own !== running) return;
    showLabels(labels);
    say(labels.length === 1 ? "1 label" : `${labels.length} labels`);
  } catch (error) {
    if (own !== running) return;
    showLabels([]);
    say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
  }
};

$("pictures").onchange = () => {
  addImages($("pictures").files);
  $("pictures").value = "";
};

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!maxImages || ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addImages(event.dataTransfer.files);
  });
}

describe();
