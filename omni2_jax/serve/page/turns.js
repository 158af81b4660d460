// The conversation as it is shown and saved: a list of turns.

import { RATE } from "./audio.js";

const NAMES = { user: "You", assistant: "omni2" };
const NEAR = 40; // pixels from the end of the conversation
const FACTOR =
  "The real-time factor is the time that an answer took, divided by the length of its speech: " +
  "below 1, the speech has no gaps.";

export class Turns {
  constructor(log) {
    this.log = log; // the element that shows the turns
    this.list = []; // { role, item, text, samples, peaks, ... } in their order
    this.follows = true; // whether the newest turn is in view, and shall be
    log.addEventListener("scroll", () => {
      this.follows = log.scrollTop + log.clientHeight > log.scrollHeight - NEAR;
    });
  }

  add(role, item, text) {
    const node = document.createElement("article");
    node.className = `turn ${role}`;
    const [who, words, figures] = ["who", "words", "figures"].map((name) => {
      const part = node.appendChild(document.createElement("p"));
      part.className = name;
      return part;
    });
    who.textContent = NAMES[role] ?? role;
    figures.title = FACTOR;
    const turn = { role, item, text: "", samples: [], peaks: [], node, words, figures };
    this.log.append(node);
    this.list.push(turn);
    this.show(turn, text);
    return turn;
  }

  find(item) {
    return this.list.find((turn) => turn.item === item);
  }

  show(turn, text) {
    turn.text = text;
    turn.words.textContent = text || (turn.role === "user" ? "(spoken)" : "…");
    this.scroll();
  }

  // Screen readers read an answer when it is complete, instead of after every word.
  setBusy(turn, isBusy) {
    turn.isBusy = isBusy;
    turn.node.setAttribute("aria-busy", isBusy);
    this.showFigures(turn);
  }

  showFigures(turn) {
    if (turn.firstAudio === undefined) return;
    const seconds = this.seconds(turn);
    const figures = [`first audio ${Math.round(turn.firstAudio)} ms`, `${seconds.toFixed(1)} s of speech`];
    if (turn.heard !== undefined) {
      figures.push(`interrupted after ${(turn.heard / 1000).toFixed(1)} s`);
    } else if (!turn.isBusy) {
      const factor = (turn.lastAudio - turn.start) / 1000 / seconds;
      figures.push(`real-time factor ${factor.toFixed(2)}`);
    }
    turn.figures.textContent = figures.join(", ");
    this.scroll();
  }

  seconds(turn) {
    return turn.samples.reduce((sum, block) => sum + block.length, 0) / RATE;
  }

  // A line between the turns.
  note(text) {
    const line = document.createElement("p");
    line.className = "note";
    line.textContent = text;
    this.log.append(line);
    this.scroll();
  }

  // Who has scrolled up to read is left alone.
  scroll() {
    if (this.follows) this.log.scrollTop = this.log.scrollHeight;
  }

  get transcript() {
    return this.list.map(({ role, text }) => `${role}: ${text || "(spoken)"}`).join("\n");
  }

  // The samples of all answers, with half a second of silence after each.
  get blocks() {
    const spoken = this.list.filter((turn) => turn.samples.length);
    return spoken.flatMap((turn) => [...turn.samples, new Float32Array(RATE / 2)]);
  }

  // The turns that have a text, as items for a new connection: questions that were only spoken are
  // not known, nor are the answers to them.
  get history() {
    const known = [];
    let question = null;
    for (const turn of this.list) {
      if (turn.role === "user") question = turn.text ? turn : null;
      else if (question && turn.text) known.push(question, turn);
    }
    return known.map(({ role, item, text }) => {
      const type = role === "user" ? "input_text" : "output_text";
      return { type: "message", role, id: item, content: [{ type, text }] };
    });
  }
}
