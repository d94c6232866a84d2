"""Jobs over files of requests in the format of OpenAI's batch API: from lines to requests, and from answers to lines.

The format: https://platform.openai.com/docs/guides/batch. A line that is no good request gets a line with its error.
"""
