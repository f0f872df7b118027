"""Long-context video understanding as unix steps.

Text teaches a language model to read far; images teach it to see; then it can watch an hour of video.
"""

__version__ = "0.1.0"
