//! Tokens that the device chooses: the decode region with the choice behind it is queued some tokens ahead of the host,
//! which reads what was chosen from its own memory.

use std::{collections::VecDeque, sync::Arc};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaEvent, sys::CUdeviceptr};

use super::{
    device::{Device, Launch, PinnedBuffer, explain},
    launches::{self, MAX_TOP_K, choice_counts, choice_settings},
    params::ChooseParams,
    region::Region,
    scratch::Scratch,
};
use crate::backend::{SamplingParams, StreamStart, TokenStream, Written, not_finite};

/// Tokens that are queued before the oldest is waited for: while the host deals with one, the device has another.
const AHEAD: usize = 3;

/// What the choice reads and writes in the host's memory.
pub struct Choice {
    device: Arc<Device>,
    vocab_size: usize,
    /// f64 (context_len + 1)
    uniforms: PinnedBuffer,
    /// i32 (context_len + 1): the text, as far as the device has to know it, and what it chose
    text: PinnedBuffer,
    /// u32 (vocab_size / 32): a bit for each token that may be chosen, where not all may
    allowed: PinnedBuffer,
    /// One for each token that is queued at a time.
    events: Vec<CudaEvent>,
}

impl Choice {
    pub fn new(device: &Arc<Device>, vocab_size: usize, context_len: usize) -> Result<Self> {
        let places = context_len + 1;
        Ok(Self {
            device: device.clone(),
            vocab_size,
            uniforms: device.allocate_pinned(places * size_of::<f64>())?,
            text: device.allocate_pinned(places * size_of::<i32>())?,
            allowed: device.allocate_pinned(vocab_size.div_ceil(32) * size_of::<u32>())?,
            events: (0..AHEAD)
                .map(|_| device.new_event())
                .collect::<Result<_>>()?,
        })
    }

    /// The launches behind those of a decoded token, which choose among all tokens.
    pub fn launches(&self, scratch: &Scratch) -> Result<[Launch; 2]> {
        self.launches_among(0, scratch)
    }

    /// Likewise, among those that are allowed.
    pub fn launches_among_allowed(&self, scratch: &Scratch) -> Result<[Launch; 2]> {
        self.launches_among(self.allowed.device_address(), scratch)
    }

    fn launches_among(&self, allowed: CUdeviceptr, scratch: &Scratch) -> Result<[Launch; 2]> {
        launches::choose(
            &self.device,
            ChooseParams {
                logits: scratch.logits,
                settings: scratch.choice_settings,
                counts: scratch.token_counts,
                lists: scratch.choice_lists,
                inputs: scratch.inputs,
                uniforms: self.uniforms.device_address(),
                text: self.text.device_address(),
                allowed,
                vocabulary: self.vocab_size as i32,
                unused: 0,
            },
        )
    }

    /// Gives the device what it needs for a text.
    fn prepare(&mut self, scratch: &Scratch, start: &StreamStart) -> Result<()> {
        let StreamStart {
            text,
            sampling,
            banned,
            uniforms,
        } = start;
        let places = self.text.len() / size_of::<i32>();
        ensure!(
            text.len() + uniforms.len() <= places,
            "{} tokens behind {} do not fit into a context of {}",
            uniforms.len(),
            text.len(),
            places - 1
        );
        let settings = choice_settings(sampling, banned);
        scratch.upload(scratch.choice_settings, bytemuck::bytes_of(&settings))?;
        if settings.adjusts != 0 {
            let counts = choice_counts(&settings, self.vocab_size, text, banned);
            scratch.upload(scratch.token_counts, bytemuck::cast_slice(&counts))?;
        }
        let tokens: &[u8] = bytemuck::cast_slice(text);
        self.text[..tokens.len()].copy_from_slice(tokens);
        let numbers: &[u8] = bytemuck::cast_slice(uniforms);
        let first = text.len() * size_of::<f64>();
        self.uniforms[first..][..numbers.len()].copy_from_slice(numbers);
        Ok(())
    }
}

/// Whether the device can choose so: it has room for [`MAX_TOP_K`] candidates.
pub fn covers(sampling: &SamplingParams) -> bool {
    sampling.temperature == 0.0 || (1..=MAX_TOP_K).contains(&sampling.top_k)
}

/// A text that goes on by itself.
pub struct Stream<'a> {
    choice: &'a mut Choice,
    region: &'a mut Region,
    written: &'a mut Written,
    /// Places in the text of tokens that are queued, the oldest first.
    queued: VecDeque<usize>,
    /// The place of the next token to queue, and the end of the text.
    next: usize,
    end: usize,
}

impl<'a> Stream<'a> {
    /// The first token to compute and its position must lie in device memory already.
    pub fn new(
        choice: &'a mut Choice,
        region: &'a mut Region,
        written: &'a mut Written,
        scratch: &Scratch,
        start: &StreamStart,
    ) -> Result<Self> {
        choice.prepare(scratch, start)?;
        Ok(Self {
            choice,
            region,
            written,
            queued: VecDeque::with_capacity(AHEAD),
            next: start.text.len(),
            end: start.text.len() + start.uniforms.len(),
        })
    }

    fn queue(&mut self) -> Result<()> {
        self.region.run_and_choose()?;
        self.note()
    }

    /// Takes note of a token that was queued.
    fn note(&mut self) -> Result<()> {
        self.written.add(self.next - 1..self.next);
        self.choice.events[self.next % AHEAD]
            .record(self.choice.device.stream())
            .map_err(explain)
            .context("recording an event")?;
        self.queued.push_back(self.next);
        self.next += 1;
        Ok(())
    }

    /// The token that was queued first, once it is chosen.
    fn oldest(&mut self) -> Result<u32> {
        let place = self.queued.pop_front();
        let place = place.context("every token of the stream was taken")?;
        self.choice.events[place % AHEAD]
            .synchronize()
            .map_err(|error| self.region.explain(explain(error)))
            .with_context(|| {
                format!(
                    "computing position {} on {}",
                    place - 1,
                    self.choice.device.name()
                )
            })?;
        let token = self.choice.text.read_i32(place);
        u32::try_from(token).map_err(|_| not_finite())
    }
}

impl TokenStream for Stream<'_> {
    fn next_token(&mut self) -> Result<u32> {
        while self.queued.len() < AHEAD && self.next < self.end {
            self.queue().map_err(|error| self.region.explain(error))?;
        }
        self.oldest()
    }

    fn next_allowed(
        &mut self,
        allowed: &mut dyn FnMut() -> Result<Option<Vec<u32>>>,
    ) -> Result<u32> {
        ensure!(
            self.queued.is_empty(),
            "what may be chosen is asked for before a token is queued"
        );
        if self.next < self.end {
            self.region
                .run()
                .map_err(|error| self.region.explain(error))?;
            match allowed()? {
                None => self.choice.allowed.fill(0xff),
                Some(words) => {
                    let bytes: &[u8] = bytemuck::cast_slice(&words);
                    let len = bytes.len().min(self.choice.allowed.len());
                    self.choice.allowed[..len].copy_from_slice(&bytes[..len]);
                    self.choice.allowed[len..].fill(0);
                }
            }
            self.region.choose_allowed()?;
            self.note()?;
        }
        self.oldest()
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // What is queued writes to memory that the next batch uses. An error is that batch's to report.
        let _ = self.choice.device.synchronize();
    }
}
