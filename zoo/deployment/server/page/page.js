// The page of `zoo serve`. What the server or a file says reaches the page as text alone, never as markup. Nothing is stored:
// token, images and history live in this tab's memory. Images go to the server without their names.
import { renderMarkdown } from "./markdown.js";

const HISTORY = 24, ROWS = 10, TRIES = 5, THUMBNAIL = 192;
const $ = (id) => document.getElementById(id);
const state = { token: null, model: null, facts: null, entries: [], current: null, serial: 0, all: false, stop: null, waiting: [], working: false };

class Refused extends Error {
  constructor(words, status) { super(words); this.status = status; }
}

// ---- asking the server ----

const WORDS = {
  400: "The server did not accept the request.",
  401: "The server wants its token.",
  404: "There is no such model on this server.",
  408: "The image took too long to arrive.",
  413: "The image is too large for this server.",
  415: "This kind of file is not read here.",
  421: "The server does not answer under this address.",
  422: "This image cannot be read.",
  503: "The server is busy.",
};

async function saidBy(response) {
  const words = WORDS[response.status] ?? `The server failed (${response.status}).`;
  try {
    const { error } = await response.json();
    return typeof error === "string" && error ? `${words} The server says: ${error}` : words;
  } catch { return words; }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

/** Ask once more after Retry-After where the server is busy, and with the token where it wants one. */
async function ask(path, { body, signal, waits = () => {} } = {}) {
  for (let tried = 1; ; tried += 1) {
    const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", body, headers, signal, cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Refused("The server cannot be reached. Is `zoo serve` still running?", 0);
    }
    if (response.ok) return response.json();
    if (response.status === 401) {
      if (!(await askToken(state.token !== null))) throw new Refused(WORDS[401], 401);
      tried -= 1;
    } else if (response.status === 503 && tried < TRIES) {
      const seconds = Math.min(60, Math.max(1, Number(response.headers.get("Retry-After")) || 2));
      waits(seconds, tried + 1);
      await pause(seconds, signal);
    } else throw new Refused(await saidBy(response), response.status);
  }
}

let asking = null;

function askToken(wrong) {
  asking ??= new Promise((resolve) => {
    const box = $("token-box"), input = $("token");
    $("token-text").textContent = wrong
      ? "That token was not accepted; try again." : "Whoever started it has it. It is kept in this tab's memory alone.";
    input.value = "";
    box.returnValue = "";
    box.addEventListener("close", () => {
      asking = null;
      if (box.returnValue === "given") state.token = input.value.trim();
      input.value = "";
      resolve(box.returnValue === "given");
    }, { once: true });
    box.showModal();
    input.focus();
  });
  return asking;
}

// ---- words ----

/** Two places, and never 1.00 or 0.00 for what is neither. */
function score(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (value > 0.995 && value < 1) return ">0.99";
  if (value < 0.005 && value > 0) return "<0.01";
  return value.toFixed(2);
}

const percent = (value) => `${Number((100 * value).toFixed(1))} %`;
const listed = (names) => names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} or ${names.at(-1)}`;

function setWords({ prediction, facts }) {
  const conformal = facts?.rules?.conformal, set = prediction.prediction_set ?? [], classes = facts?.classes ?? [];
  if (!conformal) return ["This model has no rule for prediction sets.", ""];
  const cover = `Made to hold the true class in ${percent(conformal.coverage)} of images like those of validation; of an image unlike them it promises nothing.`;
  if (conformal.quantile === null) return ["No class can be ruled out: validation was too small.", cover];
  if (set.length === 0) return ["No class fits: the image is unlike those of validation.", cover];
  if (set.length === 1) return [`Only ${set[0]}.`, cover];
  return [set.length === classes.length ? `Any class: ${listed(set)}.` : `${set.length === 2 ? "Either" : "One of"} ${listed(set)}.`, cover];
}

function referWords({ prediction, facts }) {
  if (prediction.refer) return `Refer to a human${prediction.refer_reason ? `: ${prediction.refer_reason}` : "."}`;
  const rule = facts?.rules?.refer;
  if (!rule) return "This model has no rule for when to ask a human.";
  return `The rule asks for no human: the score is at least ${score(rule.threshold)}.`;
}

// ---- the picture and its map ----

const RAMP = [[48, 16, 107], [165, 44, 96], [243, 120, 25], [252, 243, 160]];

function colour(value) {
  const place = Math.min(0.9999, Math.max(0, value)) * (RAMP.length - 1), low = Math.floor(place), part = place - low;
  return RAMP[low].map((from, channel) => from + part * (RAMP[low + 1][channel] - from));
}

/** Return the map as a small canvas, h x w; the stronger, the more opaque. */
function paintMap(values) {
  const small = new OffscreenCanvas(values[0].length, values.length), context = small.getContext("2d");
  const pixels = context.createImageData(small.width, small.height);
  values.flat().forEach((value, index) => {
    const known = Number.isFinite(value) ? value : 0;
    pixels.data.set([...colour(known), 255 * Math.min(1, Math.max(0, known))], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
  return small;
}

/** Return which part of the upright image the map covers: left, top, right, bottom in [0, 1]. */
function boxOf(entry) {
  const box = entry?.prediction?.activation_box;
  return Array.isArray(box) && box.length === 4 && box.every(Number.isFinite) ? box : [0, 0, 1, 1];
}

function drawMap() {
  const canvas = $("map"), entry = state.current, values = entry?.prediction?.activation_map;
  const dots = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = canvas.height = Math.round($("stage").clientWidth * dots);
  const strength = Number($("strength").value) / 100;
  if (!values?.length || !$("shown").checked || !strength) return;
  const context = canvas.getContext("2d"), [left, top, right, bottom] = boxOf(entry);
  // Of an image that is not shown, the size is not known: its map is drawn over the whole square.
  const [width, height] = entry.width ? [entry.width, entry.height] : [1 / (right - left), 1 / (bottom - top)];
  const scale = canvas.width / Math.max(width, height);
  const x = (canvas.width - width * scale) / 2 + left * width * scale, y = (canvas.height - height * scale) / 2 + top * height * scale;
  const wide = (right - left) * width * scale, high = (bottom - top) * height * scale;
  context.imageSmoothingQuality = "high";
  context.globalAlpha = strength;
  context.drawImage(paintMap(values), x, y, wide, high);
  if (left <= 0.001 && top <= 0.001 && right >= 0.999 && bottom >= 0.999) return;
  Object.assign(context, { globalAlpha: 0.7, strokeStyle: "#fff", lineWidth: dots });
  context.setLineDash([5 * dots, 4 * dots]);
  context.strokeRect(x + dots / 2, y + dots / 2, wide - dots, high - dots);
}

function showPicture(entry) {
  const picture = $("picture"), held = document.activeElement === $("drop");
  $("drop").hidden = true;
  if (held) $("choose").focus();
  picture.hidden = !entry.address;
  if (entry.address) picture.src = entry.address; else picture.removeAttribute("src");
  picture.alt = `Image ${entry.serial}, as you gave it`;
  $("placeholder").hidden = Boolean(entry.address);
  $("placeholder-text").textContent = entry.address ? "" : `${entry.kind} images are read by the server, but this browser cannot show them.`;
}

/** Return in words where a map is brightest, for those who do not see it. */
function brightest(values) {
  const flat = values.flat(), place = flat.indexOf(Math.max(...flat)), wide = values[0].length;
  const third = (part, names) => names[Math.min(2, Math.floor(3 * part))];
  const row = third((Math.floor(place / wide) + 0.5) / values.length, ["at the top", "in the middle", "at the bottom"]);
  const column = third(((place % wide) + 0.5) / wide, [", left", "", ", right"]);
  return `${row}${column}`;
}

function showMapState(entry) {
  const has = Boolean(entry?.prediction?.activation_map?.length);
  $("looking").disabled = !has;
  const cut = boxOf(entry).some((edge, place) => Math.abs(edge - (place > 1)) > 0.001);
  $("looking-text").textContent = has
    ? `What spoke for ${entry.prediction.label}: most of it ${brightest(entry.prediction.activation_map)} of the picture${cut ? ", dashed the part that the network sees" : ""}. It explains the network, not what is in the image.`
    : (entry?.facts ?? state.facts)?.explains === false ? "This model gives no map." : "Shown with an answer, where the model gives a map.";
  drawMap();
}

// ---- the answer ----

function verdict(kind, label, words, value = "") {
  const box = $("verdict");
  box.dataset.state = kind;
  $("label").replaceChildren(document.createTextNode(label));
  if (value) {
    const number = document.createElement("span");
    number.textContent = ` ${value}`;
    $("label").append(number);
  }
  $("refer").textContent = words;
}

function cell(kind, text, name) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function showScores(prediction) {
  const scores = Object.entries(prediction?.scores ?? Object.fromEntries((state.facts?.classes ?? []).map((name) => [name, null])));
  if (prediction) scores.sort((one, other) => other[1] - one[1]);
  const shown = state.all ? scores : scores.slice(0, ROWS), set = new Set(prediction?.prediction_set ?? []);
  $("scores").tBodies[0].replaceChildren(...shown.map(([name, value], place) => {
    const row = document.createElement("tr"), head = cell("th", name), track = cell("span", "", "track"), bar = document.createElement("i");
    head.scope = "row";
    bar.style.width = `${100 * Math.min(1, Math.max(0, value ?? 0))}%`;
    track.setAttribute("aria-hidden", "true");
    track.append(bar);
    head.append(track);
    if (prediction && place === 0) row.className = "first";
    row.append(head, cell("td", score(value), "value"), cell("td", set.has(name) ? "in set" : "", "in"));
    return row;
  }));
  $("all").hidden = scores.length <= ROWS;
  $("all").textContent = state.all ? `Show the first ${ROWS}` : `Show all ${scores.length} classes`;
}

function show(entry) {
  state.current = entry;
  showPicture(entry);
  const { prediction, fault, waits } = entry;
  $("again").hidden = !fault;
  if (fault) verdict("error", "No answer", fault);
  else if (prediction) verdict(prediction.refer ? "refer" : "answer", prediction.label, referWords(entry), score(prediction.scores[prediction.label]));
  else if (waits) verdict("busy", ...waits);
  showScores(prediction ?? null);
  const [words, note] = prediction ? setWords(entry) : ["–", ""];
  $("set").textContent = words;
  $("set-note").textContent = note;
  showMapState(entry);
  showDevice();
  showHistory();
}

/** Warn where the chosen model is medical, or the one that gave the answer. */
function showDevice() {
  $("device").hidden = !(state.facts?.medical || state.current?.medical);
}

// ---- one image after the other ----

const KINDS = [[/\.(dcm|dicom)$/i, "DICOM", "application/dicom"], [/\.tiff?$/i, "TIFF", "image/tiff"]];

function kindOf(file) {
  const known = KINDS.find(([pattern, , type]) => pattern.test(file.name) || file.type === type);
  return known ? { kind: known[1], type: known[2] } : { kind: (file.type.split("/")[1] ?? "").toUpperCase().slice(0, 12) || "Such", type: file.type };
}

async function newEntry(file) {
  const entry = { file, ...kindOf(file), serial: (state.serial += 1), name: file.name, address: null, thumbnail: null, width: 0, height: 0, prediction: null, facts: null, medical: false, fault: null, waits: null };
  const address = URL.createObjectURL(file), picture = new Image();
  try {
    picture.src = address;
    await picture.decode();
    Object.assign(entry, { address, width: picture.naturalWidth, height: picture.naturalHeight });
    entry.thumbnail = await thumbnail(picture);
  } catch {
    if (!entry.address) URL.revokeObjectURL(address);
  }
  state.entries.unshift(entry);
  state.entries.splice(HISTORY).forEach(forget);
  return entry;
}

async function thumbnail(picture) {
  const scale = Math.min(1, THUMBNAIL / Math.max(picture.naturalWidth, picture.naturalHeight));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(scale * picture.naturalWidth)), Math.max(1, Math.round(scale * picture.naturalHeight)));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return URL.createObjectURL(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.8 }));
}

function forget(entry) {
  for (const address of [entry.address, entry.thumbnail]) if (address) URL.revokeObjectURL(address);
}

/** Forget an entry's answer, for another will come; what it waits for is said where the entry is looked at. */
function wait(entry, label, words) {
  Object.assign(entry, { prediction: null, facts: null, fault: null, waits: [label, words] });
  if (state.current === entry) show(entry);
}

async function predict(entry) {
  const stop = (state.stop = new AbortController()), form = new FormData();
  form.append("files", new Blob([entry.file], { type: entry.type }), "image"); // never the file's own name
  const { model, facts } = state; // of which all words about the answer are, whatever is chosen when it is looked at
  $("fault").textContent = "";
  state.current = entry;
  wait(entry, "Asking the model", "");
  $("stop").hidden = false;
  try {
    const query = new URLSearchParams({ explain: "true", ...(model ? { model } : {}) });
    const waits = (seconds, turn) => wait(entry, "The server is busy", `Asking again in ${seconds} s (try ${turn} of ${TRIES}).`);
    const answer = await ask(`predict?${query}`, { body: form, signal: stop.signal, waits });
    const [prediction] = answer.predictions;
    if (prediction.error) entry.fault = `${WORDS[422]} The server says: ${prediction.error}`;
    else Object.assign(entry, { prediction, facts, model: answer.model });
    entry.medical = Boolean(answer.not_a_medical_device);
  } catch (error) {
    entry.fault = stop.signal.aborted ? "Stopped." : error instanceof Refused ? error.message : "The server's answer cannot be read.";
  }
  entry.waits = state.stop = null;
  $("stop").hidden = true;
  if (state.current === entry) show(entry); else showHistory();
}

/** Ask about files, or anew about an entry, one after the other: what comes first is answered first. */
async function enqueue(...jobs) {
  state.waiting.push(...jobs);
  if (state.working) {
    for (const job of jobs) if (!(job instanceof File)) wait(job, "Waiting its turn", "The server is being asked about another image.");
    return;
  }
  verdict("busy", "Reading the image", "");
  state.working = true;
  while (state.waiting.length) {
    const job = state.waiting.shift(), entry = job instanceof File ? await newEntry(job) : job;
    if (state.entries.includes(entry)) await predict(entry);
  }
  state.working = false;
}

function stopAll() {
  for (const job of state.waiting.splice(0)) if (!(job instanceof File)) Object.assign(job, { waits: null, fault: "Stopped." });
  if (state.current) show(state.current);
  state.stop?.abort();
}

function take(files) {
  const found = [...files];
  if (!found.length) { $("fault").textContent = "No image was in what you gave."; return; }
  enqueue(...found);
}

// ---- history ----

function showHistory() {
  const held = document.activeElement?.closest?.("#history button")?.dataset.serial;
  $("clear").disabled = !state.entries.length;
  $("history").replaceChildren(...state.entries.map((entry) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.dataset.serial = entry.serial;
    if (entry === state.current) button.setAttribute("aria-current", "true");
    if (entry.thumbnail) {
      const picture = document.createElement("img");
      Object.assign(picture, { src: entry.thumbnail, alt: "" });
      button.append(picture);
    } else button.append(cell("span", entry.address ? "" : entry.kind, "none"));
    const { prediction } = entry;
    button.append(cell("span", `${entry.serial}. ${entry.name}`, "name"));
    button.append(cell("span", entry.fault ? "No answer" : prediction ? `${prediction.label} ${score(prediction.scores[prediction.label])}` : "…", "said"));
    if (prediction && $("model").options.length > 1) button.append(cell("span", entry.model, "by"));
    if (prediction?.refer) button.append(cell("span", "Refer to a human", "refers"));
    button.addEventListener("click", () => show(entry));
    item.append(button);
    return item;
  }));
  if (held) $("history").querySelector(`[data-serial="${held}"]`)?.focus();
}

function clear() {
  stopAll();
  state.entries.splice(0).forEach(forget);
  state.current = null;
  $("picture").removeAttribute("src");
  $("picture").hidden = $("placeholder").hidden = true;
  $("drop").hidden = false;
  $("again").hidden = $("stop").hidden = true;
  verdict("idle", "No image yet", "Drop, choose or paste an image.");
  showScores(null);
  $("set").textContent = "–";
  $("set-note").textContent = "";
  showMapState(null);
  showDevice();
  showHistory();
  $("drop").focus();
}

// ---- the model ----

function interval(scores, name) {
  const value = scores?.[name], range = scores?.[`${name}_ci`];
  if (typeof value !== "number") return null;
  return Array.isArray(range) ? `${value.toFixed(3)} [${range.map((end) => Number(end).toFixed(3)).join(", ")}]` : value.toFixed(3);
}

function showFacts(facts) {
  const rows = [
    ["Bundle", facts.name],
    ["Network", facts.model],
    ["Trained on", facts.dataset],
    ["Classes", facts.classes.length > 12 ? `${facts.classes.length}` : facts.classes.join(", ")],
    ["Input", `${facts.image_size} × ${facts.image_size} pixels`],
    ["Format", `${facts.format}, ${facts.precision}`],
  ];
  for (const [split, words] of [["test", "on test"], ["val", "on validation"]]) {
    for (const [name, shown] of [["balanced_accuracy", "Balanced accuracy"], ["top1", "Accuracy"]]) {
      const said = interval(facts[split], name);
      if (said) { rows.push([`${shown} ${words} [95\u00a0%]`, `${said}, of ${facts[`${split}_of`]}`]); break; }
    }
  }
  $("facts").replaceChildren(...rows.filter(([, said]) => said).map(([name, said]) => {
    const pair = document.createElement("div");
    pair.append(cell("dt", name), cell("dd", said));
    return pair;
  }));
}

async function load(model) {
  const query = model ? `?${new URLSearchParams({ model })}` : "";
  const facts = await ask(`model${query}`);
  Object.assign(state, { facts, model: model ?? null, all: false });
  document.title = `${facts.dataset} · zoo`;
  $("title").textContent = facts.dataset;
  $("subtitle").textContent = `${facts.model}, ${facts.classes.length} classes`;
  showDevice();
  const warmth = facts.rules?.temperature;
  $("calibration").textContent = typeof warmth === "number" && warmth !== 1 ? `Calibrated on validation (temperature ${warmth.toFixed(2)}).` : "Not calibrated further (temperature 1).";
  showFacts(facts);
  $("card").replaceChildren(renderMarkdown(facts.card ?? ""));
  showScores(null);
  showMapState(state.current);
}

async function start() {
  try {
    const names = await ask("models"), list = Array.isArray(names) ? names : names.models ?? [];
    const found = list.map((each) => typeof each === "string" ? each : each.name);
    $("model").replaceChildren(...found.map((name) => new Option(name, name)));
    $("chooser").hidden = found.length < 2;
    await load(found[0]);
  } catch (error) {
    verdict("error", "Not ready", error instanceof Refused ? error.message : "The server's answer cannot be read.");
    $("again").hidden = false;
  }
  document.body.classList.remove("loading");
}

$("model").addEventListener("change", async (event) => {
  state.stop?.abort();
  try {
    await load(event.target.value);
    if (state.current) enqueue(state.current);
  } catch (error) { verdict("error", "No answer", error.message); }
});
for (const id of ["drop", "choose"]) $(id).addEventListener("click", () => $("file").click());
$("camera").addEventListener("click", () => $("photo").click());
for (const id of ["file", "photo"]) {
  $(id).addEventListener("change", ({ target }) => { const files = [...target.files]; target.value = ""; if (files.length) take(files); });
}
let within = 0;
const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (carriesFiles(event)) { within += 1; document.body.classList.add("dragging"); } });
document.addEventListener("dragleave", (event) => { if (carriesFiles(event) && (within -= 1) <= 0) { within = 0; document.body.classList.remove("dragging"); } });
document.addEventListener("dragover", (event) => { event.preventDefault(); });
document.addEventListener("drop", (event) => { // anywhere, or the browser would leave the page for the file
  event.preventDefault();
  within = 0;
  document.body.classList.remove("dragging");
  take(event.dataTransfer?.files ?? []);
});
document.addEventListener("paste", (event) => {
  if (event.target.closest?.("input")) return;
  const files = event.clipboardData?.files ?? [];
  event.preventDefault();
  take(files);
});
for (const id of ["shown", "strength"]) $(id).addEventListener("input", drawMap);
new ResizeObserver(drawMap).observe($("stage"));
$("again").addEventListener("click", () => state.current ? enqueue(state.current) : start());
$("stop").addEventListener("click", stopAll);
$("all").addEventListener("click", () => { state.all = !state.all; showScores(state.current?.prediction ?? null); });
$("clear").addEventListener("click", clear);
$("token-form").addEventListener("submit", () => { $("token-box").returnValue = "given"; });
$("token-form").querySelector("[type=submit]").value = "given";
$("token-cancel").addEventListener("click", () => $("token-box").close(""));
start();
