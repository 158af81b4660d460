// Runs in the audio thread: hands the microphone's samples on in blocks of 40 ms.

const BLOCK = 960; // samples at 24 kHz

class Microphone extends AudioWorkletProcessor {
  block = new Float32Array(BLOCK);
  length = 0;

  process([[channel]]) {
    for (const sample of channel ?? []) {
      this.block[this.length++] = sample;
      if (this.length === BLOCK) {
        this.port.postMessage(this.block);
        this.length = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
