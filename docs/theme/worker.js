// Browsers start no workers in pages that were opened from a file: there a hidden frame does the work of search.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = load(frame, url)
      this.inside.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => load(frame, next)), this.ready)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }

  function load(frame, url) {
    const script = frame.contentDocument.createElement("script")
    script.src = new URL(url, location).href
    return new Promise((loaded, failed) => {
      script.onload = loaded
      script.onerror = failed
      frame.contentDocument.body.appendChild(script)
    })
  }
}
