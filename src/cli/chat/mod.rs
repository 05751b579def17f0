//! `sharpi chat`: a conversation in the terminal.

mod answer;
mod conversation;
mod editor;
mod typed;

use std::{
    fs,
    io::{self, Write},
    mem,
    path::Path,
};

use anyhow::{Context, Error, Result, ensure};
use indicatif::HumanBytes;
use tempfile::NamedTempFile;

use self::{
    answer::Answer,
    conversation::Conversation,
    editor::{Editor, Input},
    typed::{HELP, Typed, to_type},
};
use super::{
    args::ReasoningDisplay,
    backend::Loaded,
    escape::{escaped, escaped_layout, escaped_lines},
    exit::Outcome,
    interrupt::Interrupt,
    resolve::{ChatRequest, read_turns, without_effect},
};
use crate::{
    engine::{FinishReason, GenerateOptions, Generation, Session, generate},
    model::{Ignored, Message, Prompt, TemplateOptions, Transcript, Vocabulary},
};

/// Where dropping turns makes room, this part of the context becomes free at least.
const FREE_PART: usize = 4;

pub fn run(mut request: ChatRequest) -> Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    request.model.download()?;
    let (loaded, ()) = request.compute.load(&request.model, |vocabulary| {
        ensure!(
            vocabulary.chat_template.is_some(),
            "{} has no chat template (tokenizer.chat_template), and without one there are no turns: `sharpi run --raw` has it \
             go on with a text",
            vocabulary.gguf.name()
        );
        Ok(())
    })?;
    let Loaded {
        session,
        vocabulary,
        ..
    } = loaded;
    let context_len = session.backend().limits().context_len;
    let sampling = request.sampling.resolve(&vocabulary.gguf, context_len)?;
    tracing::debug!("{sampling:?}");
    interrupt.rests();
    tracing::info!(
        "{} on {}, with a context of {context_len} tokens; /help lists what can be typed besides messages",
        escaped(
            vocabulary
                .gguf
                .str("general.name")?
                .unwrap_or(vocabulary.gguf.name())
        ),
        escaped(session.backend().device())
    );
    let mut conversation = Conversation::default();
    conversation.set_system(request.system.as_deref().unwrap_or_default());
    let mut chat = Chat {
        editor: Editor::new()?,
        interrupt,
        session,
        vocabulary,
        template: request.template,
        options: GenerateOptions {
            max_tokens: request.max_tokens,
            stop: request.stop,
            ignore_eos: request.ignore_eos,
            logprobs: None,
            sampling,
            constraint: None,
        },
        reasoning: request.reasoning,
        show_progress: request.compute.show_progress,
        conversation,
        transcript: Transcript::default(),
        last: None,
        // A date that nobody gave may well be ignored.
        said: match request.day_matters {
            true => Vec::new(),
            false => vec![Ignored::Date],
        },
    };
    chat.talk()?;
    // The process ends, and the system takes everything back at once: sooner than we could give it back piece by piece.
    mem::forget((chat.session, chat.vocabulary));
    Ok(Outcome::Done)
}

struct Chat {
    editor: Editor,
    interrupt: Interrupt,
    session: Session,
    vocabulary: Vocabulary,
    template: TemplateOptions,
    options: GenerateOptions,
    reasoning: ReasoningDisplay,
    show_progress: bool,
    conversation: Conversation,
    /// What the model has seen of it.
    transcript: Transcript,
    /// The last answer.
    last: Option<Generation>,
    /// What was said to have no effect.
    said: Vec<Ignored>,
}

impl Chat {
    /// Takes what is typed until that ends.
    fn talk(&mut self) -> Result<()> {
        let mut interrupted = false;
        loop {
            let typed = match self.editor.read("")? {
                Input::Typed(typed) => typed,
                Input::End => return Ok(()),
                Input::Interrupted => {
                    if mem::replace(&mut interrupted, true) {
                        say("/exit or Ctrl-D ends the conversation");
                    }
                    continue;
                }
            };
            interrupted = false;
            match Typed::parse(&typed) {
                Typed::Exit => return Ok(()),
                typed => self.obey(typed)?,
            }
        }
    }

    fn obey(&mut self, typed: Typed) -> Result<()> {
        match typed {
            Typed::Nothing | Typed::Exit => {}
            Typed::Message(message) => self.ask(&message)?,
            Typed::System(None) => say(match self.conversation.system() {
                Some(message) => message
                    .text()
                    .unwrap_or("the system prompt is no single text"),
                None => "there is no system prompt",
            }),
            Typed::System(Some(text)) => self.conversation.set_system(&text),
            Typed::Reset => self.conversation.reset(),
            Typed::Retry => self.retry()?,
            Typed::Edit => self.edit()?,
            Typed::Save(path) => self.save(&path)?,
            Typed::Load(path) => self.load(&path),
            Typed::Stats => self.say_stats(),
            Typed::Help => say(HELP),
            Typed::Mistake(message) => say(&message),
        }
        Ok(())
    }

    fn ask(&mut self, message: &str) -> Result<()> {
        let mut asked = self.conversation.clone();
        asked.ask(message);
        self.answer(asked)
    }

    fn retry(&mut self) -> Result<()> {
        let mut asked = self.conversation.clone();
        if !asked.drop_answer() {
            say("there is no message to answer");
            return Ok(());
        }
        let sampling = &mut self.options.sampling;
        sampling.seed = sampling.seed.wrapping_add(1);
        if sampling.temperature == 0.0 {
            say("--temp 0 takes the likeliest tokens, which stay the same");
        }
        self.answer(asked)
    }

    fn edit(&mut self) -> Result<()> {
        let Some(text) = self.conversation.last_question().and_then(Message::text) else {
            say("there is no message of yours to edit");
            return Ok(());
        };
        let Input::Typed(typed) = self.editor.read(&to_type(text))? else {
            return Ok(());
        };
        match Typed::parse(&typed) {
            Typed::Message(message) => {
                let mut asked = self.conversation.clone();
                asked.drop_last();
                asked.ask(&message);
                self.answer(asked)
            }
            _ => {
                say("that is no message, and nothing has changed");
                Ok(())
            }
        }
    }

    /// Has the model answer the last turn of `asked`, which becomes the conversation where it does.
    fn answer(&mut self, mut asked: Conversation) -> Result<()> {
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
            say("stopped before the answer began: the message was not sent");
            return Ok(());
        }
        for &id in &answer.ids {
            self.transcript.push(id, &self.vocabulary.tokenizer);
        }
        asked.answer(&answer.reasoning, &answer.text);
        self.conversation = asked;
        let cut_off = generation.finish_reason == FinishReason::Length;
        let by_flag = self.options.max_tokens == Some(generation.generated_tokens);
        self.last = Some(generation);
        match (cut_off, by_flag) {
            (false, _) => Ok(()),
            (true, true) => {
                say("cut off by --max-tokens");
                Ok(())
            }
            (true, false) => self.continue_after_full_context(),
        }
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
                say("the message was not sent");
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
            self.drop_turns(&mut shorter)?;
            self.conversation = shorter;
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

    fn context_len(&self) -> usize {
        self.session.backend().limits().context_len
    }

    fn save(&mut self, path: &Path) -> Result<()> {
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

    fn load(&mut self, path: &Path) {
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

    fn say_stats(&self) {
        let backend = self.session.backend();
        let cache = backend.kv_layout();
        say(&format!(
            "device       {} ({})\n\
             context      {} of {} tokens\n\
             KV cache     {}, {} a token",
            backend.name(),
            backend.device(),
            self.session.len(),
            self.context_len(),
            cache.name(),
            HumanBytes(cache.bytes_per_token() as u64)
        ));
        if let Some(generation) = &self.last {
            say(&format!("last answer  {}", speed(generation)));
        }
    }
}

/// What an answer took.
fn speed(generation: &Generation) -> String {
    format!(
        "{} of {} tokens read, {:.1} tokens/s; {} generated, {:.1} tokens/s",
        generation.prefilled_tokens,
        generation.prompt_tokens,
        generation.prefill_tokens_per_second(),
        generation.generated_tokens,
        generation.decode_tokens_per_second()
    )
}

/// Writes a file that is there as a whole or not at all, readable for its owner alone.
fn write_messages(path: &Path, messages: &[Message]) -> Result<()> {
    // A link stays one.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut file = NamedTempFile::new_in(directory)?;
    serde_json::to_writer_pretty(&mut file, messages)?;
    file.write_all(b"\n")?;
    file.persist(&path)?;
    Ok(())
}

/// Answers a command.
fn say(text: &str) {
    // A standard error that cannot be written to is no reason to end.
    let _ = writeln!(io::stderr(), "{}", escaped_layout(text));
}

fn say_error(error: &Error) {
    tracing::error!("{}", escaped_lines(&format!("{error:#}")));
}
