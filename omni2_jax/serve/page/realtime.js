// A connection of the Realtime API. Events of the server become DOM events of their type.

// With API keys, the page is opened as http://HOST/#key=...; what follows # is not sent to the server.
export const KEY = new URLSearchParams(location.hash.slice(1)).get("key");
const RETRY_MILLISECONDS = 2000;

export class Realtime extends EventTarget {
  connect() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const protocols = ["realtime", ...(KEY ? [`openai-insecure-api-key.${KEY}`] : [])];
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/realtime?model=omni2`, protocols);
    this.socket.onopen = () => this.emit("open", {});
    this.socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      this.emit(event.type, event);
    };
    this.socket.onclose = () => {
      this.emit("closed", {});
      setTimeout(() => this.connect(), RETRY_MILLISECONDS);
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
