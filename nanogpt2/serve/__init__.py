"""A local HTTP server: OpenAI's API for completions, and a page to write and look inside.

options.py is the command line. server.py loads the models and runs uvicorn; app.py is the Starlette
application: its routes, and the checks before them. worker.py runs the model's work in one thread.
openai.py and page.py read a body and write the answer of OpenAI's endpoints and of the page's own;
writing.py and inside.py are their work with the model. The page is page.html.
"""
