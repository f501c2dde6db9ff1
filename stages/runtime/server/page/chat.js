// The conversation: what was said, kept in this browser, and what may be done with it.

import { answer, models, ServerError } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const SETTINGS = [...NUMBERS, "system", "model"];
const ENDS = { length: "; it was cut off by its length", stop: "" };

let known = [];
let messages = []; // {role, content, tokens?, note?, error?}
let running = null; // what ends the answer that is being made

function keep() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, $(id).value]));
  try {
    localStorage.setItem("chat", JSON.stringify({ messages, settings, colour: $("colour").checked }));
  } catch { /* full, or not allowed: the page works without */ }
  sessionStorage.setItem("key", $("key").value); // never beyond this tab
}

function restore() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("chat") ?? "{}"); } catch { /* as if nothing was kept */ }
  messages = kept.messages ?? [];
  for (const id of SETTINGS) if (id !== "model") $(id).value = kept.settings?.[id] ?? "";
  $("colour").checked = kept.colour ?? false;
  $("key").value = sessionStorage.getItem("key") ?? "";
  return kept.settings?.model;
}

function element(kind, { cls = "", text = "", on, label } = {}) {
  const made = document.createElement(kind);
  made.className = cls;
  made.textContent = text;
  if (on) made.addEventListener("click", on);
  if (label) made.setAttribute("aria-label", label);
  if (kind === "button") made.type = "button";
  return made;
}

function tokenSpans(message) {
  return message.tokens.map(({ token, logprob }) => {
    const made = element("span", { cls: "token", text: token });
    const sure = Math.exp(logprob);
    made.title = `${(100 * sure).toFixed(1)} %`;
    made.style.background = `hsl(${Math.round(120 * sure)} 70% 50% / ${(0.45 * (1 - sure)).toFixed(2)})`;
    return made;
  });
}

// What is between two fences is code; whatever it says, it stays text.
function parts(content) {
  const found = content.split(/^```.*$/m);
  if (found.length < 2) return found;
  const lines = found.map((text) => text.replace(/^\n|\n$/g, "")); // a block begins on a line of its own
  return lines.map((text, at) => at % 2 ? element("pre", { text }) : text);
}

function fill(text, message) {
  if ($("colour").checked && message.tokens?.length) text.replaceChildren(...tokenSpans(message));
  else if (message.role === "assistant") text.replaceChildren(...parts(message.content));
  else text.textContent = message.content;
}

function shown(message, at) {
  const item = element("li", { cls: `message ${message.role}` });
  const mine = message.role === "user";
  item.append(element("span", { cls: "who", text: mine ? "You" : $("model").value }));
  const text = element("div", { cls: "text" });
  fill(text, message);
  item.append(text);
  const below = element("div", { cls: "below" });
  if (message.error) {
    const error = element("span", { cls: "error", text: message.error });
    error.setAttribute("role", "alert");
    below.append(error);
  }
  if (message.note) below.append(element("span", { text: message.note }));
  if (!running) {
    if (mine) below.append(element("button", { text: "Edit", on: () => edit(at) }));
    else if (at === messages.length - 1) below.append(element("button", { text: "Retry", on: () => retry(at) }));
    below.append(element("button", { text: "Copy", on: () => navigator.clipboard?.writeText(message.content) }));
  }
  item.append(below);
  return item;
}

function show() {
  $("messages").replaceChildren(...messages.map(shown));
  $("empty").hidden = messages.length > 0;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("new").disabled = Boolean(running);
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

function edit(at) {
  $("text").value = messages[at].content;
  messages = messages.slice(0, at);
  keep();
  show();
  $("text").focus();
}

function retry(at) {
  messages = messages.slice(0, at);
  reply();
}

function body() {
  const said = messages.filter(({ content, role }) => content || role === "user");
  const system = $("system").value.trim();
  const asked = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []),
      ...said.map(({ role, content }) => ({ role, content }))],
  };
  for (const id of NUMBERS) if ($(id).value !== "") asked[id] = Number($(id).value);
  if ($("colour").checked) asked.logprobs = true;
  return asked;
}

async function reply() {
  const asked = body();
  const message = { role: "assistant", content: "", tokens: [] };
  messages.push(message);
  running = new AbortController();
  show();
  $("status").textContent = "Reading…";
  const began = performance.now();
  let first = 0, pieces = 0;
  const text = $("messages").lastElementChild.querySelector(".text");
  const main = document.querySelector("main");
  try {
    for await (const part of answer(asked, $("key").value, running.signal)) {
      if (part.text || part.tokens.length) {
        first ||= performance.now();
        pieces += 1;
        message.content += part.text;
        message.tokens.push(...part.tokens);
        const below = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
        fill(text, message);
        if (below) main.scrollTop = main.scrollHeight;
        const rate = pieces > 1 ? `, ${((pieces - 1) / ((performance.now() - first) / 1000)).toFixed(1)} tokens/s` : "";
        $("status").textContent = `${pieces} tokens${rate}`;
      }
      if (part.finish) message.note = ENDS[part.finish] ?? "";
      if (part.usage) message.note = note(part.usage, began, first) + (message.note ?? "");
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else if (error instanceof ServerError) message.error = error.message;
    else throw error;
  } finally {
    running = null;
    $("status").textContent = message.error ? "" : message.note === "stopped" ? "Stopped." : "Done.";
    keep();
    show();
    $("text").focus();
  }
}

function note(usage, began, first) {
  const made = usage.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  const rate = made > 1 && first ? `, ${((made - 1) / seconds).toFixed(1)} tokens/s` : "";
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const wait = first ? `, first after ${((first - began) / 1000).toFixed(1)} s` : "";
  return `${made} tokens${rate}${wait}; ${usage.prompt_tokens} read${cached ? `, ${cached} of them known` : ""}`;
}

function describe() {
  const model = known.find(({ id }) => id === $("model").value);
  if (!model) return;
  const window = model.context_window ? `, ${model.context_window.toLocaleString()} tokens of context` : "";
  const [summary, list] = $("card").children;
  summary.textContent = `${model.scheme}, ${model.target}${window}; ${model.proofs.verdict}`;
  list.replaceChildren(...model.proofs.checks.map(({ name, ok, detail }) =>
    element("li", { cls: ok ? "" : "error", text: `${ok ? "✓" : "✗"} ${name}: ${detail}` })));
  document.title = model.id;
}

async function load(chosen) {
  try {
    known = await models($("key").value);
  } catch (error) {
    $("status").textContent = error.message;
    return;
  }
  $("status").textContent = "";
  $("model").replaceChildren(...known.map(({ id }) => new Option(id, id)));
  if (known.some(({ id }) => id === chosen)) $("model").value = chosen;
  describe();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("text").value.trim();
  if (!content || running) return;
  $("text").value = "";
  messages.push({ role: "user", content });
  reply();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("new").addEventListener("click", () => {
  messages = [];
  keep();
  show();
  $("text").focus();
});
$("settings-button").addEventListener("click", (event) => {
  $("settings").hidden = !$("settings").hidden;
  event.currentTarget.setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("change", keep);
$("key").addEventListener("change", () => load());
$("colour").addEventListener("change", show);
$("model").addEventListener("change", () => { describe(); keep(); });

load(restore()).then(show);
