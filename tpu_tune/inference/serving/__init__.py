"""`tpu-tune serve`: an OpenAI-compatible server for one base and its adapters.

`batch` is what runs on the device, `engine` the thread that owns it, `asked` reads requests, `answers` writes what the
API returns, `app` brings them together as an ASGI application, and `page.html` is its web page.
"""
