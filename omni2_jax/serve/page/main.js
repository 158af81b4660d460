// The page: what it shows, and what its buttons do.

import { Microphone, PEAK, Player, RATE, fromBase64, peaksOf, toBase64, wavFile } from "./audio.js";
import { KEY, Realtime } from "./realtime.js";
import { Turns } from "./turns.js";

const element = (id) => document.getElementById(id);
const realtime = new Realtime();
const microphone = new Microphone();
const turns = new Turns(element("conversation"));
const responses = new Set(); // ids of those that have begun and not ended
const headers = KEY ? { Authorization: `Bearer ${KEY}` } : {};
// On mute, the server must hear silence to notice that the question is over.
const SILENCE = toBase64(new Float32Array(RATE));
const LEVELS = 60; // decibels that the meter shows
const WAVE_PEAKS = 100; // that fill the waveform's width, if the answer has no more
let context, player, drawing;
let shown = null; // the answer whose waveform is shown
let answer = null; // the newest answer's turn
let questionEnd = null; // when the user's turn ended, by performance.now()
let isReady = false; // whether the server has begun a session
let isSpoken = true; // whether the model answers by voice
let isUserSpeaking = false;
let isOpening = false; // whether the browser asks the user for the microphone
let mustSend = false; // whether the written question waits for a connection

// Browsers allow sound only after the user has done something.
function startAudio() {
  if (context) return;
  context = new AudioContext({ sampleRate: RATE });
  player = new Player(context, () => {
    showStatus();
    drawWave();
  });
}

// The newest answer's waveform; what was heard of it has another colour. While it is heard, this
// draws it again and again: the server may need this computer, too, so not for every frame.
function drawWave() {
  const canvas = element("wave");
  const pen = canvas.getContext("2d");
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  const peaks = shown?.peaks ?? [];
  const heard = ((shown?.heard ?? player?.playedMilliseconds ?? 0) * RATE) / (1000 * PEAK);
  const width = canvas.width / Math.max(peaks.length, WAVE_PEAKS);
  const { color, accentColor } = getComputedStyle(canvas);
  peaks.forEach((peak, i) => {
    const height = Math.max(devicePixelRatio, Math.sqrt(peak) * canvas.height);
    pen.fillStyle = i < heard ? accentColor : color;
    pen.fillRect(i * width, (canvas.height - height) / 2, Math.max(1, 0.7 * width), height);
  });
  clearTimeout(drawing);
  drawing = player?.isPlaying ? setTimeout(drawWave, 100) : null;
}

function notice(text) {
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

function status() {
  if (!isReady) return element("status").dataset.offline;
  if (isUserSpeaking) return "hearing you";
  if (player?.isPlaying || (responses.size && answer?.samples.length)) return "answering";
  if (responses.size) return "thinking";
  return microphone.isOn ? "listening" : "ready";
}

function showStatus() {
  const text = status();
  // Screen readers read every change of it.
  if (element("status").textContent !== text) element("status").textContent = text;
  element("stop").disabled = !responses.size && !player?.isPlaying;
}

// Stop the answer: nothing more is played, and the model forgets what was not heard.
function interrupt() {
  const isAnswering = responses.size > 0;
  // With its id: the server may have stopped it already, and have begun the next one.
  if (isAnswering) realtime.send("response.cancel", { response_id: [...responses].at(-1) });
  if (answer && isSpoken && (isAnswering || player?.isPlaying)) {
    answer.heard = player?.playedMilliseconds ?? 0;
    const place = { item_id: answer.item, content_index: 0, audio_end_ms: answer.heard };
    realtime.send("conversation.item.truncate", place);
    answer.node.classList.add("interrupted");
    turns.showFigures(answer);
  }
  player?.restart();
  answer = null;
  showStatus();
  drawWave();
}

function mute() {
  microphone.close();
  realtime.send("input_audio_buffer.append", { audio: SILENCE });
  element("microphone").textContent = "Talk";
  element("microphone").classList.remove("on");
  element("level").value = 0;
  showStatus();
}

// Errors of what the page asked for a moment too late: the answer has ended, or was forgotten.
const LATE = new Set(["response_cancel_not_active", "item_retrieve_invalid_item_id"]);
const CAUSES = {
  NotAllowedError: "the browser does not allow it",
  NotFoundError: "there is none",
  NotReadableError: "another program uses it",
};

async function unmute() {
  if (isOpening) return;
  if (!navigator.mediaDevices) {
    notice("Browsers allow the microphone on https pages and on localhost only. You can still write.");
    return;
  }
  if (realtime.isPaused) realtime.connect();
  startAudio();
  isOpening = true;
  try {
    await context.resume();
    await microphone.open(hear, mute);
  } catch (error) {
    microphone.close();
    notice(`The microphone cannot be used: ${CAUSES[error.name] ?? error.name}. You can still write.`);
    return;
  } finally {
    isOpening = false;
  }
  notice("");
  element("microphone").textContent = "Mute";
  element("microphone").classList.add("on");
  showStatus();
}

function hear(samples) {
  const peak = Math.max(...samples.map(Math.abs));
  element("level").value = 1 + (20 * Math.log10(peak + 1e-9)) / LEVELS;
  realtime.send("input_audio_buffer.append", { audio: toBase64(samples) });
}

function sendText(event) {
  event.preventDefault();
  const text = element("text").value.trim();
  mustSend = Boolean(text) && !isReady;
  if (!text) return;
  startAudio();
  context.resume();
  if (realtime.isPaused) realtime.connect();
  if (mustSend) return;
  interrupt();
  element("text").value = "";
  const item = { type: "message", role: "user", content: [{ type: "input_text", text }] };
  realtime.send("conversation.item.create", { item });
  realtime.send("response.create");
  questionEnd = performance.now();
}

function download() {
  save(new Blob([turns.transcript], { type: "text/plain" }), "conversation.txt");
  const blocks = turns.blocks;
  if (blocks.length) save(wavFile(blocks), "conversation.wav");
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

function useVoice(voice) {
  const audio = { output: { voice } };
  realtime.send("session.update", { session: { type: "realtime", audio } });
}

async function showVoices(current) {
  const list = element("voice");
  const chosen = list.value;
  const { data } = await (await fetch("/v1/audio/voices", { headers })).json();
  list.replaceChildren(...data.map(({ name }) => new Option(name, name, false, name === current)));
  list.disabled = data.length < 2;
  if (chosen && chosen !== current && data.some(({ name }) => name === chosen)) {
    list.value = chosen;
    useVoice(chosen);
  }
}

// A new connection knows nothing of the conversation: send what was written or transcribed.
function sendHistory() {
  const { history, list } = turns;
  history.forEach((item) => realtime.send("conversation.item.create", { item }));
  const forgotten = "The model has forgotten the spoken questions above, and its answers to them.";
  turns.note(`Connected again. ${history.length < list.length ? forgotten : ""}`);
}

async function explainRefusal() {
  const response = await fetch("/v1/models", { headers }).catch(() => null);
  if (response?.status !== 401) return;
  notice(`This server needs an API key: open ${location.origin}/#key=YOUR_KEY`);
}

realtime.on("closed", ({ wasOpen }) => {
  isReady = isUserSpeaking = false;
  responses.clear();
  turns.list.filter((turn) => turn.isBusy).forEach((turn) => turns.setBusy(turn, false));
  answer = null;
  player?.restart();
  element("status").dataset.offline = realtime.isPaused ? "paused" : "not connected; trying again";
  if (realtime.isPaused) {
    if (microphone.isOn) mute();
    notice("You have been away for long. Talk or write to go on.");
  }
  showStatus();
  if (!wasOpen) explainRefusal();
});
realtime.on("session.created", ({ session }) => {
  isReady = true;
  isSpoken = session.output_modalities.includes("audio");
  notice("");
  showStatus();
  if (turns.list.length) sendHistory();
  showVoices(session.audio.output.voice);
  if (mustSend) element("controls").requestSubmit();
});
realtime.on("input_audio_buffer.speech_started", () => {
  isUserSpeaking = true;
  interrupt();
});
realtime.on("input_audio_buffer.speech_stopped", () => {
  isUserSpeaking = false;
  questionEnd = performance.now();
  showStatus();
});
realtime.on("response.created", ({ response }) => {
  responses.add(response.id);
  answer = null;
  showStatus();
});
realtime.on("conversation.item.added", ({ item }) => {
  if (turns.find(item.id)) return;
  const [content] = item.content;
  const turn = turns.add(item.role, item.id, content?.text ?? content?.transcript ?? "");
  element("download").disabled = false;
  if (item.role !== "assistant") return;
  turn.start = questionEnd ?? performance.now();
  turns.setBusy(turn, true);
  answer = turn;
  player?.restart();
});
// What the user says, while they say it: the item itself comes at the end of the turn.
realtime.on("conversation.item.input_audio_transcription.delta", ({ item_id, delta }) => {
  const turn = turns.find(item_id) ?? turns.add("user", item_id, "");
  turns.setBusy(turn, true);
  turns.show(turn, turn.text + delta);
});
realtime.on("conversation.item.input_audio_transcription.completed", ({ item_id, transcript }) => {
  const turn = turns.find(item_id);
  if (!turn) return;
  turns.show(turn, transcript);
  turns.setBusy(turn, false);
});
realtime.on("conversation.item.input_audio_transcription.failed", ({ item_id }) => {
  const turn = turns.find(item_id);
  if (turn) turns.setBusy(turn, false);
});
for (const kind of ["output_audio_transcript", "output_text"]) {
  realtime.on(`response.${kind}.delta`, ({ item_id, delta }) => {
    const turn = turns.find(item_id);
    if (turn) turns.show(turn, turn.text + delta);
  });
}
realtime.on("response.output_audio.delta", ({ item_id, delta }) => {
  const turn = turns.find(item_id);
  if (!turn || turn !== answer) return;
  const samples = fromBase64(delta);
  turn.lastAudio = performance.now();
  turn.firstAudio ??= turn.lastAudio - turn.start;
  turn.samples.push(samples);
  turn.peaks.push(...peaksOf(samples));
  startAudio();
  player.add(samples);
  shown = turn;
  drawWave();
  turns.showFigures(turn);
  showStatus();
});
realtime.on("response.done", ({ response }) => {
  responses.delete(response.id);
  const turn = turns.find(response.output[0]?.id);
  if (turn) turns.setBusy(turn, false);
  if (response.status === "failed") notice(response.status_details.error.message);
  showStatus();
});
// The text is ahead of the speech: show what is left of an interrupted answer.
realtime.on("conversation.item.truncated", ({ item_id }) => {
  realtime.send("conversation.item.retrieve", { item_id });
});
realtime.on("conversation.item.retrieved", ({ item }) => {
  const turn = turns.find(item.id);
  if (turn) turns.show(turn, item.content[0].transcript ?? "");
});
realtime.on("error", ({ error }) => {
  if (!LATE.has(error.code)) notice(error.message);
});

element("microphone").onclick = () => (microphone.isOn ? mute() : unmute());
element("stop").onclick = interrupt;
element("controls").onsubmit = sendText;
element("text").oninput = () => (mustSend = false); // until it is sent once more
element("download").onclick = download;
element("voice").onchange = ({ target }) => useVoice(target.value);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") interrupt();
});
addEventListener("resize", () => {
  turns.scroll(); // as when a phone shows its keyboard
  drawWave();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawWave);
addEventListener("hashchange", () => location.reload()); // another key
realtime.connect();
