// Runs before the page: measures what its loudspeaker gets, by the clock of the audio.

window.heard = []; // { time, energy } of blocks, in seconds and summed squares of the samples
window.stopped = null; // when an answer was interrupted

const code = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process([[samples]]) {
    const energy = (samples ?? []).reduce((sum, sample) => sum + sample * sample, 0);
    if (energy) this.port.postMessage({ time: currentTime, energy });
    return true;
  }
});`;
const module = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
const connect = AudioNode.prototype.connect;
let context;

AudioNode.prototype.connect = function (target, ...others) {
  if (target instanceof AudioDestinationNode) {
    context = target.context;
    context.audioWorklet.addModule(module).then(() => {
      const tap = new AudioWorkletNode(context, "tap");
      tap.port.onmessage = ({ data }) => window.heard.push(data);
      connect.call(this, tap);
    });
  }
  return connect.call(this, target, ...others);
};

addEventListener("DOMContentLoaded", () => {
  new MutationObserver((changes) => {
    if (changes.some(({ target }) => target.classList.contains("interrupted"))) {
      window.stopped = context.currentTime;
    }
  }).observe(document.body, { subtree: true, attributeFilter: ["class"] });
});
