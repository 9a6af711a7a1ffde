"""Text out of a pipeline's folder, by one decode loop for every runtime.

__main__   the command line
opening    the folder to a model that can be stepped here: engine, onnxruntime on CUDA or on the CPU
command    what the command line asks for, from prompts to text
prompts    what is asked: a prompt, a file of them, or a conversation
speech     Whisper: an audio file to spectrograms, and what its decoder is prompted with
masks      SAM: a picture and points in it to a mask
frames     CoDeF: numbers of frames to pictures
batch      the loop: rows of a batch that sequences take in turn
sampling   logits to the next token
text       tokens to text that can be shown
speed      what it took
model      the same for a program: a model that can be stepped, and continues text
"""
