//! `sharpi chat`: a conversation in the terminal.

mod answer;
mod conversation;
mod editor;
mod file;
mod turn;
mod typed;

use std::{
    io::{self, Write},
    mem,
};

use anyhow::{Error, Result, ensure};
use indicatif::HumanBytes;

use self::{
    conversation::Conversation,
    editor::{Editor, Input},
    typed::{HELP, Typed, to_type},
};
use super::{
    args::ReasoningPlace,
    backend::Loaded,
    escape::{escaped, escaped_layout, escaped_lines},
    exit::Outcome,
    figures::three_digits,
    interrupt::Interrupt,
    resolve::ChatRequest,
};
use crate::{
    engine::{GenerateOptions, Generation, Session},
    model::{Ignored, Message, TemplateOptions, Transcript, Vocabulary},
};

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
    tracing::debug!("sampling: {sampling}");
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
    reasoning: ReasoningPlace,
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

    fn context_len(&self) -> usize {
        self.session.backend().limits().context_len
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
        "{} of {} tokens read, {} tokens/s; {} generated, {} tokens/s",
        generation.prefilled_tokens,
        generation.prompt_tokens,
        three_digits(generation.prefill_tokens_per_second()),
        generation.generated_tokens,
        three_digits(generation.decode_tokens_per_second())
    )
}

/// Answers a command.
fn say(text: &str) {
    // A standard error that cannot be written to is no reason to end.
    let _ = writeln!(io::stderr(), "{}", escaped_layout(text));
}

fn say_error(error: &Error) {
    tracing::error!("{}", escaped_lines(&format!("{error:#}")));
}
