"""A model of Triton's python backend that asks `suture serve`. It stands alone: numpy and Python's own library."""

import http.client
import json
import threading
import urllib.parse

import numpy as np


class TritonPythonModel:
    def initialize(self, arguments):
        import triton_python_backend_utils as triton  # which is there in Triton alone

        parameters = json.loads(arguments["model_config"])["parameters"]
        self.url = urllib.parse.urlsplit(parameters["url"]["string_value"])
        self.triton, self.model = triton, parameters["model"]["string_value"]

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request,), daemon=True).start()

    def answer(self, request):
        sender, text = request.get_response_sender(), ""
        try:
            streams = bool(self.given(request, "stream", False))
            body = json.loads(self.given(request, "sampling_parameters", b"{}")) | {"model": self.model, "stream": True}
            for piece in self.pieces(body | {"prompt": self.given(request, "text_input", b"").decode()}):
                if sender.is_cancelled():  # leaving the loop closes the connection, which frees the row
                    break
                text += piece
                if streams and piece:
                    sender.send(self.response(piece))
            if not streams:
                sender.send(self.response(text))
        except Exception as error:
            sender.send(self.triton.InferenceResponse(error=self.triton.TritonError(str(error))))
        sender.send(flags=self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def pieces(self, body):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=600)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(json.loads(answer.read())["error"]["message"])
            for line in filter(lambda line: line.startswith(b"data: {"), answer):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield event["choices"][0]["text"]
        finally:
            connection.close()

    def given(self, request, name, default):
        tensor = self.triton.get_input_tensor_by_name(request, name)
        return default if tensor is None else tensor.as_numpy().reshape(-1)[0]

    def response(self, text):
        return self.triton.InferenceResponse([self.triton.Tensor("text_output", np.array([text.encode()], np.object_))])
