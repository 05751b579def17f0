//! A turn: a message, the context that it takes, and its answer.

use anyhow::{Context, Result};

use super::{Chat, answer::Answer, conversation::Conversation, say, say_error, speed};
use crate::{
    cli::{escape::escaped, resolve::without_effect},
    engine::{FinishReason, generate},
    model::Prompt,
};

/// Where dropping turns makes room, this part of the context becomes free at least.
const FREE_PART: usize = 4;

impl Chat {
    /// Has the model answer the last turn of `asked`, which becomes the conversation where it does.
    pub fn answer(&mut self, mut asked: Conversation) -> Result<()> {
        let prompt = match self.prompt(&mut asked) {
            Ok(Some(prompt)) => prompt,
            Ok(None) => return Ok(()),
            Err(error) => {
                say_error(&error);
                return Ok(());
            }
        };
        let mut answer = Answer::new(self.reasoning, self.show_progress, &self.interrupt);
        self.interrupt.generation_starts();
        let generated = generate(
            &mut self.session,
            &self.vocabulary.tokenizer,
            &prompt,
            &self.options,
            &mut answer,
        );
        let finished = answer.finish();
        self.interrupt.rests();
        let generation = generated?;
        finished?;
        tracing::debug!("{}", speed(&generation));
        if answer.ids.is_empty() && generation.finish_reason == FinishReason::Interrupted {
            say(
                "stopped before the answer began: the message was not sent; the up arrow brings it back",
            );
            return Ok(());
        }
        for &id in &answer.ids {
            self.transcript.push(id, &self.vocabulary.tokenizer);
        }
        asked.answer(&answer.reasoning, &answer.text);
        self.conversation = asked;
        let finish_reason = generation.finish_reason;
        self.last = Some(generation);
        match finish_reason {
            FinishReason::Length => say("cut off by --max-tokens"),
            FinishReason::ContextFull => self.continue_after_full_context()?,
            FinishReason::Stop | FinishReason::StopString | FinishReason::Interrupted => {}
        }
        Ok(())
    }

    /// The ids of `asked`, behind which its answer comes. Where they leave no room for one, the oldest turns are dropped; `None`
    /// where that is not wanted, or not enough.
    fn prompt(&mut self, asked: &mut Conversation) -> Result<Option<Vec<u32>>> {
        let context_len = self.context_len();
        let (mut prompt, mut ids) = self.render(asked)?;
        if ids.len() >= context_len && asked.turns_len() > 1 {
            let question = format!(
                "with this message the conversation takes {} tokens, and the context holds {context_len}: drop the oldest turns?",
                ids.len()
            );
            if !self.editor.confirm(&question)? {
                say("the message was not sent; the up arrow brings it back");
                return Ok(None);
            }
            self.drop_turns(asked)?;
            (prompt, ids) = self.render(asked)?;
        }
        if ids.len() >= context_len {
            say(&format!(
                "the message takes {} tokens, and the context holds {context_len}: it was not sent; shorten it, or raise --ctx-size",
                ids.len()
            ));
            return Ok(None);
        }
        self.say_ignored(&prompt);
        self.transcript.read(&prompt, &ids);
        Ok(Some(ids))
    }

    /// Says what the template makes no use of, once.
    fn say_ignored(&mut self, prompt: &Prompt) {
        for &ignored in prompt.ignored() {
            if !self.said.contains(&ignored) {
                self.said.push(ignored);
                let name = escaped(self.vocabulary.gguf.name());
                tracing::warn!("{}", without_effect(ignored, &name));
            }
        }
    }

    /// Offers to drop turns where the last answer had no room to end.
    fn continue_after_full_context(&mut self) -> Result<()> {
        let full = format!(
            "the context of {} tokens is full, which cut the answer off",
            self.context_len()
        );
        if self.conversation.turns_len() < 2 {
            say(&format!(
                "{full}: /reset begins anew, and --ctx-size makes room for more"
            ));
            return Ok(());
        }
        if self
            .editor
            .confirm(&format!("{full}: drop the oldest turns?"))?
        {
            let mut shorter = self.conversation.clone();
            match self.drop_turns(&mut shorter) {
                Ok(()) => self.conversation = shorter,
                Err(error) => say_error(&error),
            }
        }
        Ok(())
    }

    /// Drops the oldest turns, until a part of the context is free or one turn is left.
    fn drop_turns(&self, conversation: &mut Conversation) -> Result<()> {
        let context_len = self.context_len();
        let most = context_len - context_len / FREE_PART;
        let before = conversation.turns_len();
        let len = loop {
            let (_, ids) = self.render(conversation)?;
            if ids.len() <= most || !conversation.drop_oldest() {
                break ids.len();
            }
        };
        say(&format!(
            "turns dropped: {} of {before}; the others take {len} of {context_len} tokens",
            before - conversation.turns_len()
        ));
        Ok(())
    }

    fn render(&self, conversation: &Conversation) -> Result<(Prompt, Vec<u32>)> {
        let template = self.vocabulary.chat_template.as_ref();
        let template = template.context("a conversation takes a chat template")?;
        let prompt = template.render(conversation.messages(), &self.template)?;
        let ids = self.transcript.ids_of(&prompt, &self.vocabulary.tokenizer);
        Ok((prompt, ids))
    }
}
