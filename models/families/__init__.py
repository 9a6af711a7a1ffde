"""One family of architectures a module, called after config.json's model_type.

Each has `ARCHITECTURES`, the class names that config.json may give, `PREFIX`, what its tensors' names begin with where the
head is saved too, and `build(config, where)`: a torch module whose state_dict has the checkpoint's tensor names, with
`dimensions` and a forward like suture.models.families.qwen's. That file and its test are all that a new family needs.
"""
