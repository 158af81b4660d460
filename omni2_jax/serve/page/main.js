// The page: what it shows, and what its buttons do.

import { Microphone, Player, RATE, fromBase64, toBase64, wavFile } from "./audio.js";
import { KEY, Realtime } from "./realtime.js";

const element = (id) => document.getElementById(id);
const realtime = new Realtime();
const microphone = new Microphone();
const turns = []; // { role, item, text, samples, ... } in their order
let context, player, analyser;
let answer = null; // the turn that is being answered
let questionEnd = null; // when the user's turn ended, by performance.now()

// Browsers allow sound only after the user has done something.
function startAudio() {
  if (context) return;
  context = new AudioContext({ sampleRate: RATE });
  analyser = context.createAnalyser();
  analyser.connect(context.destination);
  player = new Player(context, analyser);
  requestAnimationFrame(drawWave);
}

function drawWave() {
  const canvas = element("wave");
  canvas.width = canvas.clientWidth * devicePixelRatio;
  const pen = canvas.getContext("2d");
  const samples = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(samples);
  pen.strokeStyle = getComputedStyle(canvas).color;
  pen.beginPath();
  samples.forEach((sample, i) => {
    pen.lineTo((i / samples.length) * canvas.width, (0.5 - sample / 2) * canvas.height);
  });
  pen.stroke();
  requestAnimationFrame(drawWave);
}

function addTurn(role, item, text = "") {
  const turn = { role, item, text, samples: [], node: document.createElement("div") };
  turn.node.className = `turn ${role}`;
  turn.words = document.createElement("span");
  turn.figures = document.createElement("span");
  turn.figures.className = "figures";
  turn.node.append(turn.words, turn.figures);
  element("conversation").append(turn.node);
  turns.push(turn);
  element("download").disabled = false;
  showText(turn, text);
  return turn;
}

function showText(turn, text) {
  turn.text = text;
  turn.words.textContent = text || (turn.role === "user" ? "(spoken)" : "…");
  element("conversation").scrollTop = element("conversation").scrollHeight;
}

function notice(text) {
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

const status = (text) => (element("status").textContent = text);
const find = (item) => turns.find((turn) => turn.item === item);

// Stop the answer: nothing more is played, and the model forgets what was not heard.
function interrupt() {
  if (!player || !answer) return;
  const heard = player.playedMilliseconds;
  const wasPlaying = player.isPlaying;
  player.restart();
  if (!answer.done) realtime.send("response.cancel");
  if (wasPlaying || !answer.done) {
    const place = { item_id: answer.item, content_index: 0, audio_end_ms: heard };
    realtime.send("conversation.item.truncate", place);
    answer.node.classList.add("interrupted");
  }
  answer = null;
  element("stop").disabled = true;
}

async function toggleMicrophone() {
  const button = element("microphone");
  if (button.getAttribute("aria-pressed") === "true") {
    microphone.close();
    button.setAttribute("aria-pressed", "false");
    button.textContent = "Talk";
    element("level").value = 0;
    return;
  }
  startAudio();
  await context.resume();
  try {
    await microphone.open(context, (samples) => {
      element("level").value = Math.max(...samples.map(Math.abs));
      realtime.send("input_audio_buffer.append", { audio: toBase64(samples) });
    });
  } catch (error) {
    notice(`The microphone cannot be used (${error.name}). You can still write.`);
    return;
  }
  notice("");
  button.setAttribute("aria-pressed", "true");
  button.textContent = "Mute";
}

function sendText(event) {
  event.preventDefault();
  const text = element("text").value.trim();
  if (!text || !realtime.isOpen) return;
  startAudio();
  context.resume();
  interrupt();
  element("text").value = "";
  const item = { type: "message", role: "user", content: [{ type: "input_text", text }] };
  realtime.send("conversation.item.create", { item });
  realtime.send("response.create");
  questionEnd = performance.now();
}

function showFigures(turn) {
  if (!turn.firstAudio) return;
  const seconds = turn.samples.reduce((sum, block) => sum + block.length, 0) / RATE;
  const factor = (performance.now() - turn.start) / 1000 / seconds;
  turn.figures.textContent =
    `first audio ${Math.round(turn.firstAudio)} ms, ${seconds.toFixed(1)} s of speech, ` +
    `real-time factor ${factor.toFixed(2)}`;
}

function download() {
  const texts = turns.map((turn) => `${turn.role}: ${turn.text || "(spoken)"}`).join("\n");
  const silence = new Float32Array(RATE / 2);
  const blocks = turns.flatMap((turn) => (turn.samples.length ? [...turn.samples, silence] : []));
  save(new Blob([texts], { type: "text/plain" }), "conversation.txt");
  if (blocks.length) save(wavFile(blocks), "conversation.wav");
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

realtime.on("open", () => status("connected"));
realtime.on("closed", () => {
  status("not connected; trying again");
  player?.restart();
  answer = null;
});
realtime.on("session.created", async ({ session }) => {
  status("ready");
  notice("");
  const voices = element("voice");
  const current = session.audio.output.voice;
  const headers = KEY ? { Authorization: `Bearer ${KEY}` } : {};
  const { data } = await (await fetch("/v1/audio/voices", { headers })).json();
  voices.replaceChildren(...data.map(({ name }) => new Option(name, name, false, name === current)));
  voices.disabled = data.length < 2;
});
realtime.on("input_audio_buffer.speech_started", () => {
  status("listening");
  interrupt();
});
realtime.on("input_audio_buffer.speech_stopped", () => {
  status("thinking");
  questionEnd = performance.now();
});
realtime.on("conversation.item.added", ({ item }) => {
  if (find(item.id)) return;
  const [content] = item.content;
  const turn = addTurn(item.role, item.id, content?.text ?? content?.transcript ?? "");
  if (item.role !== "assistant") return;
  turn.start = questionEnd ?? performance.now();
  answer = turn;
  player?.restart();
  element("stop").disabled = false;
});
realtime.on("conversation.item.input_audio_transcription.completed", (event) => {
  const turn = find(event.item_id);
  if (turn) showText(turn, event.transcript);
});
for (const kind of ["output_audio_transcript", "output_text"]) {
  realtime.on(`response.${kind}.delta`, ({ item_id, delta }) => {
    const turn = find(item_id);
    if (turn) showText(turn, turn.text + delta);
  });
}
realtime.on("response.output_audio.delta", ({ item_id, delta }) => {
  const turn = find(item_id);
  if (!turn || turn !== answer) return;
  const samples = fromBase64(delta);
  turn.firstAudio ??= performance.now() - turn.start;
  turn.samples.push(samples);
  startAudio();
  player.add(samples);
  status("answering");
  showFigures(turn);
});
realtime.on("response.done", ({ response }) => {
  const turn = find(response.output[0]?.id);
  if (turn) turn.done = true;
  if (response.status === "failed") notice(response.status_details.error.message);
  if (!answer?.samples.length) element("stop").disabled = true;
  status("ready");
});
realtime.on("error", ({ error }) => {
  // The answer may have ended by itself a moment before it was stopped.
  if (error.code !== "response_cancel_not_active") notice(error.message);
});

element("microphone").onclick = toggleMicrophone;
element("stop").onclick = interrupt;
element("controls").onsubmit = sendText;
element("download").onclick = download;
element("voice").onchange = ({ target }) => {
  const audio = { output: { voice: target.value } };
  realtime.send("session.update", { session: { type: "realtime", audio } });
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") interrupt();
});
realtime.connect();
