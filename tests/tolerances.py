"""Every tolerance of the tests, in one place. Never looser in continuous integration than here."""

IMAGE_MAX = 1e-3
"""fp32 engines against the diffusers pipeline, same weights and latents: largest difference, of full scale [0, 1]."""

SCHEDULER_REL = 1e-5
"""A sampler table against diffusers' class over a whole run: largest difference over the largest value."""

NOISE_ABS = 2e-6
"""Initial latents against torch.randn of a CPU generator (float32 log, sin and cos differ in the last places)."""

BATCH_IMAGE_MAX = 1e-4
"""The same request alone and in a batch: largest difference, of full scale."""

EXPORT_REL_RMS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""An exported graph against eager PyTorch in fp32 on seeded inputs: RMS of the difference over RMS."""

ENGINE_REL_RMS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "fp8": 1e-1}
"""An engine against the onnxruntime fp32 reference on seeded inputs: RMS of the difference over RMS."""

PSNR_16BIT_DB = 35.0
"""Pictures of 16-bit engines against fp32, in dB."""

ADHERENCE_POINTS = 1.0
"""Captions of a hundred that a fast engine may draw wrong beyond those that fp32 does."""
