"""Helpers of the diffusion models course: data, pictures, set-up and exercise checks."""
