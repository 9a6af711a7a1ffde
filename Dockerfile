# Serves a pipeline's folder, mounted at /model:  docker run -p 8000:8000 -v "$PWD/out/tiny-qwen:/model:ro" suture
# Not built by CI, and nowhere yet. A pipeline's folder refers to its checkpoint: mount that at its own path, or give --checkpoint.
FROM python:3.11-slim
COPY . /suture
RUN pip install --no-cache-dir '/suture[serve]' && useradd --create-home suture
USER suture
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["suture", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
