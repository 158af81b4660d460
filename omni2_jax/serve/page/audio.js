// The microphone as blocks of samples, and a player of samples that arrive while it plays.

export const RATE = 24000;
export const PEAK = 960; // samples of each bar of a waveform
const CUTOFF = 10000; // Hz; the model hears up to 8000
const BUTTERWORTH = [-5.7, -3, 5.7]; // Q in dB of the filters that make up one of order 6

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.length * 2);
  const view = new DataView(bytes.buffer);
  samples.forEach((sample, i) => {
    view.setInt16(2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true);
  });
  return btoa(String.fromCharCode(...bytes));
}

export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

// The largest value of every PEAK samples: what a waveform is drawn of.
export function peaksOf(samples) {
  const peaks = [];
  for (let i = 0; i < samples.length; i += PEAK) {
    peaks.push(samples.subarray(i, i + PEAK).reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0));
  }
  return peaks;
}

// Calls onBlock(samples) for every 16 ms that the microphone records, until `close`.
//
// Its audio context has the device's own rate, which Firefox demands of a microphone's; the worklet
// resamples. Before it, filters take out what 24 kHz cannot carry.
export class Microphone {
  isOn = false;

  // onLost: called when the device is unplugged or the user takes the permission back.
  async open(onBlock, onLost) {
    const constraints = { channelCount: 1, echoCancellation: true, noiseSuppression: true };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio: constraints });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("microphone_worklet.js");
    const node = new AudioWorkletNode(this.context, "microphone", { processorOptions: { rate: RATE } });
    node.port.onmessage = (event) => onBlock(event.data);
    this.source = this.context.createMediaStreamSource(this.stream);
    let last = this.source;
    for (const Q of this.context.sampleRate > RATE ? BUTTERWORTH : []) {
      last = last.connect(new BiquadFilterNode(this.context, { type: "lowpass", frequency: CUTOFF, Q }));
    }
    last.connect(node);
    this.stream.getAudioTracks()[0].onended = onLost;
    this.isOn = true;
  }

  close() {
    this.isOn = false;
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
    this.stream = this.context = null;
  }
}

// Plays samples one after the other. `played` is how many of the current answer were heard.
export class Player {
  // onSilence: called when all that was added has been heard.
  constructor(context, onSilence) {
    this.onSilence = onSilence;
    this.context = context;
    this.output = context.createGain();
    this.output.connect(context.destination);
    this.sources = new Set();
    this.restart();
  }

  restart() {
    this.sources.forEach((source) => source.stop());
    this.sources.clear();
    this.started = null; // the context's time when the answer's first sample is heard
    this.end = 0;
    this.gaps = 0; // seconds of silence because samples came too late
    this.samples = 0;
  }

  add(samples) {
    if (!samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.output);
    const now = this.context.currentTime;
    if (this.started === null) this.started = this.end = now;
    if (now > this.end) {
      this.gaps += now - this.end;
      this.end = now;
    }
    source.start(this.end);
    this.end += samples.length / RATE;
    this.samples += samples.length;
    this.sources.add(source);
    source.onended = () => {
      this.sources.delete(source);
      if (!this.isPlaying) this.onSilence();
    };
  }

  get isPlaying() {
    return this.sources.size > 0;
  }

  get playedMilliseconds() {
    if (this.started === null) return 0;
    const heard = this.context.currentTime - this.started - this.gaps;
    return Math.floor(Math.max(0, Math.min(heard, this.samples / RATE)) * 1000);
  }
}

// A WAV file (16-bit, mono, 24 kHz) of blocks of samples.
export function wavFile(blocks) {
  const length = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * length));
  const write = (offset, text) => [...text].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * length, true);
  let offset = 44;
  for (const block of blocks) {
    for (const sample of block) {
      view.setInt16(offset, Math.max(-1, Math.min(1, sample)) * 32767, true);
      offset += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
