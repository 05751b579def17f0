//! `sharpi tokenize`.

use anyhow::Result;

use super::{
    Input, ModelSource,
    input::{chat, text},
    model::model,
    usage,
};
use crate::cli::args::{TemplateArgs, TokenizeArgs, VerbosityArgs};

pub struct TokenizeRequest {
    pub model: ModelSource,
    pub input: Input,
    pub json: bool,
}

pub fn tokenize(args: TokenizeArgs, verbosity: &VerbosityArgs) -> Result<TokenizeRequest> {
    let TemplateArgs {
        system,
        no_think,
        tools,
        date,
    } = &args.prompt.template;
    let messages = &args.prompt.messages;
    let for_chat = system.is_some() || messages.is_some() || tools.is_some() || date.is_some();
    if !args.chat && (for_chat || *no_think) {
        return Err(usage(
            "--system, --messages, --tools, --date and --no-think are for the chat template: add --chat",
        ));
    }
    Ok(TokenizeRequest {
        input: if args.chat {
            chat(args.prompt)?
        } else {
            Input::Raw(text(&args.prompt)?)
        },
        model: model(args.model.into(), None, verbosity)?,
        json: args.json,
    })
}
