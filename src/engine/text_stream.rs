//! Bytes of tokens in, whole characters out, up to a stop string.

/// Turns the bytes of one token after another into text that can be shown at once: a character is held back until
/// all its bytes are there, and text that may turn out to be the start of a stop string until that is decided.
pub struct TextStream {
    stop: Vec<String>,
    /// The incomplete last character: at most three bytes.
    bytes: Vec<u8>,
    /// Decoded, not yet released.
    held: String,
}

impl TextStream {
    /// `stop`: strings that end the text; empty ones are ignored.
    pub fn new(stop: &[String]) -> Self {
        Self {
            stop: stop.iter().filter(|s| !s.is_empty()).cloned().collect(),
            bytes: Vec::new(),
            held: String::new(),
        }
    }

    /// Takes the bytes of a token. Returns the text that is now certain, and whether a stop string was met; it and
    /// what follows it are dropped. Bytes that can never become UTF-8 become U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        self.bytes.extend_from_slice(bytes);
        self.decode();
        let first = self.stop.iter().filter_map(|stop| self.held.find(stop));
        if let Some(start) = first.min() {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let held = self.possible_stop_start();
        (self.held.drain(..held).collect(), false)
    }

    /// The text that was held back, now that no more comes. A character whose last bytes never came is dropped.
    pub fn finish(&mut self) -> String {
        self.bytes.clear();
        std::mem::take(&mut self.held)
    }

    /// Moves all complete characters from `bytes` to `held`.
    fn decode(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.held.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_incomplete(invalid) {
                self.bytes = invalid.to_vec();
            } else if !invalid.is_empty() {
                self.held.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Where in `held` the longest suffix begins that is the start of a stop string; its length if there is none.
    fn possible_stop_start(&self) -> usize {
        let is_stop_start = |at: &usize| {
            let suffix = &self.held[*at..];
            self.stop.iter().any(|stop| stop.starts_with(suffix))
        };
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        starts.find(is_stop_start).unwrap_or(self.held.len())
    }
}

/// Whether more bytes could make `bytes`, which are not UTF-8, a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], tokens: &[&[u8]]) -> (Vec<String>, bool, String) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut stream = TextStream::new(&stop);
        let mut shown = Vec::new();
        for token in tokens {
            let (text, stopped) = stream.push(token);
            shown.push(text);
            if stopped {
                return (shown, true, stream.finish());
            }
        }
        (shown, false, stream.finish())
    }

    #[test]
    fn a_character_split_over_tokens_comes_out_whole() {
        let (shown, _, rest) = run(&[], &[b"a\xf0\x9f", b"\xa6", b"\x8a", b"b"]);
        assert_eq!(shown, ["a", "", "🦊", "b"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn bytes_that_cannot_become_a_character_are_replaced_once_known() {
        let (shown, _, _) = run(&[], &[b"\xf0\x9f", b"x\xff\xa6y"]);
        assert_eq!(shown, ["", "\u{fffd}x\u{fffd}\u{fffd}y"]);
    }

    #[test]
    fn an_unfinished_character_at_the_end_is_dropped() {
        let (shown, _, rest) = run(&[], &[b"ok\xe4\xbd"]);
        assert_eq!((shown[0].as_str(), rest.as_str()), ("ok", ""));
    }

    #[test]
    fn a_stop_string_over_several_tokens_ends_the_text_before_it() {
        let (shown, stopped, rest) = run(&["END"], &[b"one E", b"N", b"D two"]);
        assert_eq!(shown, ["one ", "", ""]);
        assert!(stopped);
        assert_eq!(rest, "");
    }

    #[test]
    fn text_that_only_looked_like_a_stop_string_is_released() {
        let (shown, stopped, rest) = run(&["END"], &[b"E", b"E", b"NENx EN"]);
        assert_eq!(shown, ["", "E", "ENENx "]);
        assert!(!stopped);
        assert_eq!(rest, "EN");
    }

    #[test]
    fn the_earliest_of_several_stop_strings_wins() {
        let (shown, stopped, _) = run(&["three", "two", ""], &[b"one two three"]);
        assert_eq!(shown, ["one "]);
        assert!(stopped);
    }
}
