"""An OpenAI-compatible server for a base model and for runs' adapters.

Here: `models` (what is served, and under which names; missing GGUF files are made), `engine`
(llama.cpp's server, watched and started again), `transformers_process` (answers where llama.cpp
can't), `fields` (what a request may contain), `access` (who may send one), `app` (the routes).
Not here: the process of llama.cpp (`jetson_ft.export.llama`).
Start reading at `server.serve`.
"""
