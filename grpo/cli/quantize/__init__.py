"""`quartet quantize`: a policy in 4 or 8 bits a weight by llm-compressor, and what that costs."""
