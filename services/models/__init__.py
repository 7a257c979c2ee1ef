"""Every network, sampler and pack. Knows no transport, no Ray and no service."""
