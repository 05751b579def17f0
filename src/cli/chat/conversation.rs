//! The turns of a conversation.

use crate::{engine::unmarked, model::Message};

/// A system message, where there is one, then turns, each of which a message of the user's begins.
#[derive(Clone, Default)]
pub struct Conversation(Vec<Message>);

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self(messages)
    }
}

impl Conversation {
    pub fn messages(&self) -> &[Message] {
        &self.0
    }

    pub fn system(&self) -> Option<&Message> {
        self.0.first().filter(|message| message.role() == "system")
    }

    /// Puts `text` in the place of the system message, or none where it is empty.
    pub fn set_system(&mut self, text: &str) {
        let old = usize::from(self.system().is_some());
        let new = (!text.is_empty()).then(|| Message::new("system", text));
        self.0.splice(..old, new);
    }

    /// Drops all but the system message.
    pub fn reset(&mut self) {
        self.0.truncate(usize::from(self.system().is_some()));
    }

    /// Begins a turn.
    pub fn ask(&mut self, message: &str) {
        self.0.push(Message::new("user", message));
    }

    /// Ends a turn with what the model wrote.
    pub fn answer(&mut self, reasoning: &str, text: &str) {
        let answer = Message::new("assistant", text);
        self.0.push(match unmarked(reasoning) {
            "" => answer,
            thought => answer.with_reasoning(thought),
        });
    }

    /// The user's message that begins the last turn.
    pub fn last_question(&self) -> Option<&Message> {
        self.turns().last().map(|start| &self.0[start])
    }

    /// Drops what the last question was answered. `false` where nothing was asked.
    pub fn drop_answer(&mut self) -> bool {
        let last = self.turns().last();
        last.map(|start| self.0.truncate(start + 1)).is_some()
    }

    /// Drops the last turn.
    pub fn drop_last(&mut self) {
        if let Some(start) = self.turns().last() {
            self.0.truncate(start);
        }
    }

    /// Drops the first turn, unless it is the only one. Whether it did.
    pub fn drop_oldest(&mut self) -> bool {
        let mut turns = self.turns();
        let (Some(first), Some(second)) = (turns.next(), turns.next()) else {
            return false;
        };
        drop(turns);
        self.0.drain(first..second);
        true
    }

    pub fn turns_len(&self) -> usize {
        self.turns().count()
    }

    /// Where turns begin.
    fn turns(&self) -> impl DoubleEndedIterator<Item = usize> {
        let messages = self.0.iter().enumerate();
        messages
            .filter(|(_, message)| message.role() == "user")
            .map(|(index, _)| index)
    }
}
