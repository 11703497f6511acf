"""The generated catalogue of the demo: product designs in look-alike families, photographed by a simulated camera."""
