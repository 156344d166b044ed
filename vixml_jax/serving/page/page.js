"use strict";
// Sends the form as one request and shows the answer. Texts become text nodes, so no text of a data set is read as HTML.

const $ = (id) => document.getElementById(id);
const NAMES = { plain: "Similarity", retrieval_augmented: "Similarity and training queries", blend: "Blend (probability)" };
const images = [];
let health = null;
let running = null;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// The server.

async function request(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
    throw new Error(key ? "The API key is not valid." : "Enter an API key.");
  }
  const answer = await response.json().catch((error) => {
    if (error instanceof SyntaxError) return null;  // Such as the page of a proxy.
    throw error;
  });
  if (response.ok && answer) return answer;
  const status = `The server answered with status ${response.status} ${response.statusText}`.trim();
  throw new Error(answer?.error?.message ? explained(answer.error) : `${status}.`);
}

function explained(error) {
  const image = /images\[(\d+)\]/.exec(error.field || "");
  const name = image ? images[image[1]]?.name : (error.field || "").split(".").pop();
  return name ? `${name}: ${error.message}` : error.message;
}

async function connect() {
  const response = await fetch("/healthz").catch(() => null);
  const found = response?.ok ? await response.json() : { status: "unreachable" };
  if (found.status !== "ready") {
    $("model").textContent = found.status === "starting" ? "The server is loading the model…" : "The server cannot be reached.";
    setTimeout(connect, 2000);
    return;
  }
  health = found;
  showModel();
  await suggest();
  const asked = queryOfAddress();
  if (!asked) return;
  if ($("key-form").hidden) find(asked);
  else $("title").value = asked;  // It is searched when the key is there.
}

const queryOfAddress = () => new URLSearchParams(location.search).get("q") ?? "";

function showModel() {
  const search = health.search === "scann" ? "approximate search" : "exact search";
  $("model").textContent = `${health.labels.toLocaleString("en")} labels, ${search}`;
  $("content-field").hidden = !health.texts.includes("content");
  $("pictures-field").hidden = !maxImages();
  $("pictures-hint").textContent = `(optional, up to ${maxImages()})`;
  $("k").max = health.max_k;
  $("k").value = Math.min($("k").value, health.max_k);
  $("ranking").replaceChildren(...health.rankings.map((name) => new Option(NAMES[name], name)));
  $("ranking").value = health.ranking;
  $("ranking-field").hidden = health.rankings.length < 2;
  $("find").disabled = false;
  showTail();
}

const maxImages = () => (health?.pictures ? health.images : 0);

function showTail() {
  $("tail-field").hidden = $("ranking").value !== "blend";
  $("tail-value").textContent = $("tail").value;
}

async function suggest() {
  const found = await request("/v1/suggestions").catch((error) => (say(error.message, true), null));
  if (!found) return;
  $("chips").replaceChildren(...found.queries.map((text) => {
    const chip = element("button", "", text);
    chip.type = "button";
    chip.onclick = () => find(text);
    return chip;
  }));
  $("categories").replaceChildren(...found.categories.map((name) => new Option(name, name)));
  $("categories-field").hidden = !found.categories.length;
  $("examples").hidden = !found.queries.length || Boolean($("labels").children.length);
}

// Images of the query.

function addImages(files) {
  const added = [...files].filter((file) => file.type.startsWith("image/"));
  if (added.length < files.length) say("Only image files can be added.", true);
  else if (images.length + added.length > maxImages()) say(`The model uses at most ${maxImages()} images.`, true);
  else say("");
  images.push(...added.slice(0, maxImages() - images.length));
  showImages();
}

function showImages() {
  $("thumbnails").replaceChildren(...images.map((file, place) => {
    const image = element("img", "");
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
    return element("li", "", image, element("span", "", file.name), remove);
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

// Queries and answers.

async function body() {
  const query = { title: $("title").value };
  if (!$("content-field").hidden && $("content").value) query.content = $("content").value;
  if (images.length) query.images = await Promise.all(images.map(asDataUrl));
  const asked = { queries: [query], k: $("k").valueAsNumber, ranking: $("ranking").value, explain: health.explain };
  if (asked.ranking === "blend") asked.tail = $("tail").valueAsNumber;
  for (const name of ["allow", "deny"]) {
    const uids = $(name).value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (uids.length) asked[name] = uids;
  }
  const categories = [...$("categories").selectedOptions].map((option) => option.value);
  if (categories.length) asked.categories = categories;
  return JSON.stringify(asked);
}

function find(text) {
  $("title").value = text;
  $("form").requestSubmit();
}

async function search() {
  running?.abort();
  const own = running = new AbortController();
  showLabels([]);
  $("examples").hidden = true;
  $("find").disabled = true;
  say("Searching…");
  try {
    const sent = { method: "POST", signal: own.signal, headers: { "Content-Type": "application/json" }, body: await body() };
    const answer = await request("/v1/predict", sent);
    if (own !== running) return;
    const labels = answer.answers[0].predictions;
    showLabels(labels);
    say(labels.length ? `${labels.length} label${labels.length === 1 ? "" : "s"}` : "No label was found. Change the query or its filters.");
  } catch (error) {
    if (own !== running) return;
    say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
    $("examples").hidden = !$("chips").children.length;
  } finally {
    if (own === running) $("find").disabled = false;
  }
}

function showLabels(labels) {
  const best = Math.max(...labels.map((found) => found.score), Number.MIN_VALUE);
  $("labels").replaceChildren(...labels.map((found, place) => {
    const text = element("span", "text", found.text || found.label, element("span", "uid", found.label));
    const filled = element("span", "");
    filled.style.width = `${100 * Math.min(Math.max(found.score / best, 0), 1)}%`;
    const parts = [text, element("span", "score", found.score.toFixed(3)), element("span", "bar", filled)];
    const answer = element(found.why ? "button" : "div", "answer", ...parts);
    const item = element("li", "", answer);
    if (!found.why) {
      answer.tabIndex = -1;
      return item;
    }
    const why = explain(found.why);
    why.id = `why-${place}`;
    why.hidden = true;
    answer.type = "button";
    answer.setAttribute("aria-expanded", "false");
    answer.setAttribute("aria-controls", why.id);
    answer.onclick = () => {
      why.hidden = !why.hidden;
      answer.setAttribute("aria-expanded", String(!why.hidden));
    };
    item.append(why);
    return item;
  }));
}

function explain(why) {
  const made = element("div", "why");
  const marked = (words) => words.flatMap((word) => [element("mark", "", word), " "]);
  if (why.words.length) made.append(element("p", "", "Words in common: ", ...marked(why.words)));
  if (!why.neighbors.length) {
    made.append(element("p", "", "None of the nearest training queries has this label."));
    return made;
  }
  made.append(element("p", "", "Similar training queries that have this label:"));
  made.append(element("ul", "", ...why.neighbors.map((near) => element(
    "li", "", ...(near.text ? markedIn(near.text, near.words) : [`number ${near.row}`]),
    ...wordsBeside(near, marked),
    element("span", "uid", `similarity ${near.score.toFixed(3)}, its labels: ${near.labels.map((label) => label.text || label.label).join(" · ")}`),
  ))));
  return made;
}

// Returns a text in parts, in which the given words are marked.
function markedIn(text, words) {
  const parts = text.split(/([\p{L}\p{N}_]+)/u);  // Words are at odd places.
  return parts.map((part, place) => (place % 2 && words.includes(part.toLowerCase()) ? element("mark", "", part) : part));
}

// Returns the words in common that the shown text does not have, because it is cut or absent.
function wordsBeside(near, marked) {
  const own = new Set((near.text || "").toLowerCase().match(/[\p{L}\p{N}_]+/gu));
  const others = near.words.filter((word) => !own.has(word));
  return others.length ? [", with ", ...marked(others)] : [];
}

// Events.

$("form").onsubmit = (event) => {
  event.preventDefault();
  const asked = $("title").value;
  if (asked !== queryOfAddress()) {
    history.pushState(null, "", asked ? `?q=${encodeURIComponent(asked)}` : location.pathname);
  }
  search();
};

window.onpopstate = () => {
  $("title").value = queryOfAddress();
  if ($("title").value) search();
  else {
    running?.abort();
    running = null;
    showLabels([]);
    say("");
    $("find").disabled = !health;
    $("examples").hidden = !$("chips").children.length;
  }
};

$("key-form").onsubmit = async (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  say("");
  await suggest();
  if (!$("key-form").hidden) return;
  $("title").focus();
  if (queryOfAddress()) $("form").requestSubmit();
};

$("ranking").onchange = $("tail").oninput = showTail;

$("pictures").onchange = () => {
  addImages($("pictures").files);
  $("pictures").value = "";
};

document.addEventListener("keydown", (event) => {
  const answers = [...document.querySelectorAll("#labels .answer")];
  const place = answers.indexOf(document.activeElement);
  const typing = document.activeElement.matches("input, textarea, select");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    $("title").focus();
    $("title").select();
  } else if (event.key === "ArrowDown" && (place >= 0 || document.activeElement === $("title"))) {
    answers[Math.min(place + 1, answers.length - 1)]?.focus();
  } else if (event.key === "ArrowUp" && place >= 0) {
    (answers[place - 1] ?? $("title")).focus();
  } else return;
  event.preventDefault();
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!maxImages() || ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addImages(event.dataTransfer.files);
  });
}

connect();
