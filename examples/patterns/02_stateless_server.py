"""A stateless HTTP server

Clients send the whole conversation each turn; nobody keeps a session. The longest prefix that is
stored is found by content, and only what is new is computed. ``parent_key`` is not needed.
"""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from erllama_core import Engine

engine = Engine()
engine.load_model("chat", backend="stub", context_opts={"n_ctx": 4096, "resident_cells_max": 0})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
        reply = engine.complete("chat", prompt, response_tokens=32).reply.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever).start()
url = f"http://127.0.0.1:{server.server_port}"

conversation = "User: What is a KV cache, and why would anybody keep one?\nAssistant:"
for question in ("And on disk?", "And in the next process?"):
    reply = urllib.request.urlopen(url, conversation.encode()).read().decode()
    engine.flush()
    conversation += f" {reply}\nUser: {question}\nAssistant:"
urllib.request.urlopen(url, conversation.encode()).read()

counters = engine.cache.counters()
print("misses:", counters.misses, "longest prefix:", counters.hits_longest_prefix)
server.shutdown()
server.server_close()
engine.close()
