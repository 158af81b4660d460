// Runs in the audio thread: hands the microphone's samples on in blocks of 16 ms: half of
// what the server's detector of speech takes at a time.

class Microphone extends AudioWorkletProcessor {
  length = 0; // of the block that is being filled
  position = 0; // of the next sample to hand on, in samples of the device behind `previous`
  previous = 0; // the device's last sample

  constructor({ processorOptions: { rate } }) {
    super();
    this.step = sampleRate / rate;
    this.block = new Float32Array(0.016 * rate);
  }

  // Resamples by drawing a line from each sample of the device to the next one.
  process([[channel]]) {
    for (const sample of channel ?? []) {
      for (; this.position < 1; this.position += this.step) {
        this.add(this.previous + this.position * (sample - this.previous));
      }
      this.position -= 1;
      this.previous = sample;
    }
    return true;
  }

  add(sample) {
    this.block[this.length++] = sample;
    if (this.length === this.block.length) {
      this.port.postMessage(this.block);
      this.length = 0;
    }
  }
}

registerProcessor("microphone", Microphone);
