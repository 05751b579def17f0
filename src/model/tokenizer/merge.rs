//! Merging neighbours, best pair first: what byte-level BPE, SentencePiece's BPE and Gemma's have in common.

use std::{cmp::Reverse, collections::BinaryHeap};

/// A stretch of text that is, or may become part of, a token.
#[derive(Debug, Clone, Copy)]
pub struct Symbol {
    /// Bytes of the text, never empty.
    pub start: usize,
    pub end: usize,
    /// `None` where the vocabulary does not have it.
    pub id: Option<u32>,
}

/// What two neighbours become.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// The lowest goes first, the leftmost of equals.
    pub rank: u32,
    pub id: u32,
}

/// Merges neighbours of `symbols` that `merge` makes one, until it makes none. Takes n log n steps.
pub fn merge_all(symbols: &mut Vec<Symbol>, merge: impl Fn(&Symbol, &Symbol) -> Option<Merge>) {
    // The indices of what stands before and after each symbol; one that lies outside says that nothing does.
    let mut before: Vec<usize> = (0..symbols.len()).map(|i| i.wrapping_sub(1)).collect();
    let mut after: Vec<usize> = (1..=symbols.len()).collect();
    let mut queue = BinaryHeap::new();
    let propose = |symbols: &[Symbol], left: usize, right: usize| {
        let (first, second) = (symbols.get(left)?, symbols.get(right)?);
        let Merge { rank, id } = merge(first, second)?;
        Some(Reverse((rank, left, second.end, id)))
    };
    queue.extend((1..symbols.len()).filter_map(|right| propose(symbols, right - 1, right)));
    while let Some(Reverse((_, left, end, id))) = queue.pop() {
        let right = after[left];
        let is_merged_away = |symbol: &Symbol| symbol.start == symbol.end;
        if is_merged_away(&symbols[left])
            || symbols.get(right).is_none_or(|symbol| symbol.end != end)
        {
            continue; // one of the two has since been merged with another
        }
        symbols[right].end = symbols[right].start;
        symbols[left].end = end;
        symbols[left].id = Some(id);
        after[left] = after[right];
        if let Some(back) = before.get_mut(after[left]) {
            *back = left;
        }
        queue.extend(propose(symbols, before[left], left));
        queue.extend(propose(symbols, left, after[left]));
    }
    symbols.retain(|symbol| symbol.start < symbol.end);
}
