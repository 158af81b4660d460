// A connection of the Realtime API. Events of the server become DOM events of their type.

// With API keys, the page is opened as http://HOST/#key=...; what follows # is not sent to the server.
export const KEY = new URLSearchParams(location.hash.slice(1)).get("key");
const RETRY_SECONDS = 2; // unless the server says how long to wait

export class Realtime extends EventTarget {
  isPaused = false; // the server has ended an idle session: its place is free until `connect`

  connect() {
    this.isPaused = false;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const protocols = ["realtime", ...(KEY ? [`openai-insecure-api-key.${KEY}`] : [])];
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/realtime?model=omni2`, protocols);
    let wasOpen = false;
    let retry = RETRY_SECONDS;
    this.socket.onopen = () => (wasOpen = true);
    this.socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      retry = event.error?.retry_after_seconds ?? retry;
      this.isPaused ||= event.error?.code === "idle_timeout";
      this.emit(event.type, event);
    };
    this.socket.onclose = () => {
      this.emit("closed", { wasOpen });
      if (!this.isPaused) setTimeout(() => this.connect(), 1000 * retry);
    };
  }

  emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  on(type, handler) {
    this.addEventListener(type, (event) => handler(event.detail));
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  send(type, fields = {}) {
    if (this.isOpen) this.socket.send(JSON.stringify({ type, ...fields }));
  }
}
