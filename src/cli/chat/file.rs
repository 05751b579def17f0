//! Conversations in files.

use std::{io::Write, path::Path};

use anyhow::{Context, Result};

use super::{Chat, say, say_error};
use crate::{
    cli::{escape::escaped, resolve::read_turns},
    model::Message,
    whole_file,
};

impl Chat {
    pub fn save(&mut self, path: &Path) -> Result<()> {
        let name = path.display();
        if path.exists()
            && !self
                .editor
                .confirm(&format!("overwrite {}?", escaped(&name.to_string())))?
        {
            say("not saved");
            return Ok(());
        }
        let messages = self.conversation.messages();
        match write_messages(path, messages).with_context(|| format!("/save {name}")) {
            Ok(()) => say(&format!("{} messages are in {name}", messages.len())),
            Err(error) => say_error(&error),
        }
        Ok(())
    }

    pub fn load(&mut self, path: &Path) {
        let messages = match read_turns("/load", path) {
            Ok(messages) => messages,
            Err(error) => return say_error(&error),
        };
        let answered = messages
            .last()
            .is_none_or(|last| last.role() == "assistant");
        let next = if answered {
            ""
        } else {
            "; /retry has the last one answered"
        };
        say(&format!("{} messages were read{next}", messages.len()));
        self.conversation = messages.into();
    }
}

fn write_messages(path: &Path, messages: &[Message]) -> Result<()> {
    let text = serde_json::to_string_pretty(messages)? + "\n";
    whole_file::replace(path, |file| Ok(file.write_all(text.as_bytes())?))
}
