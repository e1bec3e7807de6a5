"""Python interface: one function for each verb of the command line, with its options and settings as keyword arguments.

    import antransformer

    data = antransformer.prepare("corpus/*.jsonl", "data/mine", bpe_vocab_size=32768)
    run = antransformer.train(data="data/mine", preset="125m", tokens="2.5B", model={"context": 1024})
    print(run.result.val_loss, antransformer.generate(run.folder, "Once upon a time"))

Settings are the fields of ``TrainConfig``, with those of ``ModelConfig`` nested in ``model`` as in YAML; values may be
text such as ``"2.5B"``. All functions raise ``UsageError`` for wrong input and ``MachineError`` for failures of the
machine. They print nothing unless ``progress=True``; warnings go to the logger ``antransformer``.
"""
